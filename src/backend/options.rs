//! What a user may decide about Vulkan.

use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

/// How the Vulkan backend works; a part of [`RuntimeConfig`](crate::RuntimeConfig).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VulkanConfig {
    /// How messages reach kernels. Default: as the probe of the device says.
    pub mode: VulkanMode,
    /// Turns `VK_LAYER_KHRONOS_validation` on, with synchronisation validation; what it says is logged under the target
    /// `ringkernel::vulkan::validation`. For debugging: calls of the driver become many times slower. Without the
    /// layer, building the runtime fails.
    pub validation: bool,
    /// The Vulkan loader to use; `None` looks for the system's.
    pub loader: Option<PathBuf>,
    /// Bytes that kernels may take on each device; `None` means the size of its memory heaps.
    pub memory_limit: Option<u64>,
}

/// How messages reach kernels on a Vulkan device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VulkanMode {
    /// `Resident` if the probe succeeds, else `Exchange`.
    #[default]
    Auto,
    /// A running dispatch polls rings in mapped memory. The Vulkan specification does not promise that this works; no
    /// probe is made.
    Resident,
    /// A dispatch for each batch of messages, whose memory the host touches only between dispatches. What the Vulkan
    /// specification promises; tens of microseconds a batch.
    Exchange,
    /// As `Exchange`, with rings in device memory that need not be mappable, and transfers around each dispatch.
    Staged,
}

impl VulkanMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Resident, Self::Exchange, Self::Staged];

    /// The name as command lines and errors write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Resident => "resident",
            Self::Exchange => "exchange",
            Self::Staged => "staged",
        }
    }
}

impl FromStr for VulkanMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| Error::InvalidOption {
                option: "mode",
                reason: format!(
                    "'{name}' is none of: {}",
                    Self::ALL.map(Self::name).join(", ")
                ),
            })
    }
}
