//! The kernel that a device is probed by. The Vulkan specification does not promise that host and running dispatch exchange
//! messages: host accesses are made visible by submissions and fences.

use std::sync::Arc;

use crate::backend::Handler;
use crate::kernel::ShaderCode;

/// The built-in `echo`.
pub(super) fn echo() -> Handler {
    let echo = include_bytes!("../../../shaders/echo.spv").as_slice();
    // SAFETY: a module of our own, validated when it is built.
    let code = unsafe { ShaderCode::spirv(echo) };
    Handler::Shader(Arc::new(code))
}

/// The same, with traces.
pub(super) fn traced_echo() -> Handler {
    let echo = include_bytes!("../../../shaders/echo.spv").as_slice();
    let traced = include_bytes!("../../../shaders/echo.traced.spv").as_slice();
    // SAFETY: modules of our own, validated when they are built.
    let code = unsafe { ShaderCode::spirv(echo).traced(traced) };
    Handler::Shader(Arc::new(code))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::probe::{BLOCK_SIZES, run_block};
    use crate::backend::stall::StallLimits;
    use crate::backend::vulkan::VulkanBackend;
    use crate::backend::{VulkanConfig, VulkanMode};

    #[test]
    fn a_device_cannot_change_what_was_received() {
        let config = crate::RuntimeConfig {
            vulkan: VulkanConfig {
                mode: VulkanMode::Resident,
                ..VulkanConfig::default()
            },
            ..crate::RuntimeConfig::default()
        };
        let builder = crate::RingKernelRuntime::builder()
            .backend(crate::BackendType::Vulkan)
            .config(config)
            .device(0);
        let runtime = match builder.build() {
            Ok(runtime) => runtime,
            Err(error) => {
                assert!(
                    std::env::var_os("RINGKERNEL_REQUIRE_VULKAN").is_none(),
                    "{error}"
                );
                println!("skipped: {error}");
                return;
            }
        };
        let options = crate::LaunchOptions::default();
        let kernel = runtime.launch("echo", 1, 1, options).unwrap();
        kernel.activate().unwrap();
        kernel.check_that_replies_stay();
    }

    /// The probe's messages cross the wrap-around of positions; here in the modes that are never probed, too.
    #[test]
    fn positions_wrap_around_in_every_mode() {
        let limits = StallLimits::new(None, Duration::from_secs(5));
        for mode in [
            VulkanMode::Resident,
            VulkanMode::Exchange,
            VulkanMode::Staged,
        ] {
            let config = VulkanConfig {
                mode,
                ..VulkanConfig::default()
            };
            let backend = match VulkanBackend::load(&config, &[], limits) {
                Ok(backend) => backend,
                Err(error) => {
                    assert!(
                        std::env::var_os("RINGKERNEL_REQUIRE_VULKAN").is_none(),
                        "{error}"
                    );
                    println!("skipped: {error}");
                    return;
                }
            };
            let device = backend.open_device(0).unwrap();
            for block_size in BLOCK_SIZES {
                // If perhaps from other dispatches than those that ran when they were sent: always
                // so without resident dispatches.
                let seen = run_block(&device, &echo(), block_size, u32::MAX).unwrap();
                let seen = seen.unwrap_or_else(|failed| panic!("{mode:?}: {failed:?}"));
                assert_eq!(seen.received, seen.sent, "{mode:?}: {seen:?}");
            }
        }
    }
}
