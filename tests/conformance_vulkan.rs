//! The conformance suite on the first Vulkan device (or the one that `RINGKERNEL_VULKAN_DEVICE` names), in each mode,
//! under the validation layer where it is installed.
//!
//! Not shown here, because a shader can neither wait for the host outside the rings nor panic: the tests whose kernels are
//! held by a gate, and those of panics. `tests/vulkan.rs` has their likes for shaders.

#![cfg(feature = "vulkan")]

// Some of the suite is for other backends.
#[allow(dead_code)]
mod conformance;
#[path = "support/vulkan.rs"]
mod vulkan;

/// The suite for one mode.
macro_rules! mode {
    ($module:ident, $mode:ident, $echo_bytes:expr, $ping_pongs:expr, $($sharing:tt)*) => {
        mod $module {
            use ringkernel::{RuntimeBuilder, RuntimeConfig, VulkanMode};

            pub struct Vulkan;

            impl crate::conformance::Subject for Vulkan {
                const ECHO_BYTES: u64 = $echo_bytes;
                const PING_PONGS: u32 = $ping_pongs;

                fn builder_with(config: RuntimeConfig) -> RuntimeBuilder {
                    crate::vulkan::builder(VulkanMode::$mode, config)
                }

                fn missing() -> Option<String> {
                    crate::vulkan::missing()
                }

                fn inspect() {
                    crate::vulkan::expect_no_validation_message();
                }
            }

            crate::conformance! { on a device: crate::$module::Vulkan }

            mod traces {
                crate::conformance! { traces: crate::$module::Vulkan }
            }

            mod shared_rings {
                crate::conformance! { $($sharing)*: crate::$module::Vulkan }
            }

            // Software drivers and bridges take cores.
            mod cores {
                crate::conformance! { crate::$module::Vulkan: sharing::{ auto_starves_nobody } }
            }
        }
    };
}

mode!(resident, Resident, 1 << 20, 1_000_000, shared rings on a device);
// A submission a message.
mode!(exchange, Exchange, 2 << 20, 50_000, shared rings on a device);
mode!(staged, Staged, 2 << 20, 50_000, no shared rings);
