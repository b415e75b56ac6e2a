//! What the Vulkan tests share: which device they run on, whether there is one, and what the validation layer says.

#![allow(dead_code)]

use std::sync::{Mutex, OnceLock, PoisonError};

use ringkernel::{
    BackendType, RingKernelRuntime, RuntimeBuilder, RuntimeConfig, VulkanConfig, VulkanMode,
};

/// Set where Vulkan must be there: a test that is skipped fails then.
const REQUIRED: &str = "RINGKERNEL_REQUIRE_VULKAN";

/// Names the device under test.
const DEVICE: &str = "RINGKERNEL_VULKAN_DEVICE";

/// What the validation layer has said.
static MESSAGES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl log::Log for Collector {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target() == "ringkernel::vulkan::validation"
            || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target() == "ringkernel::vulkan::validation" {
            MESSAGES
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// A builder for the device under test.
pub fn builder(mode: VulkanMode, config: RuntimeConfig) -> RuntimeBuilder {
    let config = RuntimeConfig {
        vulkan: VulkanConfig {
            mode,
            validation: has_validation(),
            ..config.vulkan.clone()
        },
        ..config
    };
    let builder = RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .config(config);
    if std::env::var_os(DEVICE).is_some() {
        builder
    } else {
        builder.device(0)
    }
}

fn try_build(validation: bool) -> Result<RingKernelRuntime, ringkernel::Error> {
    RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .device(0)
        .config(RuntimeConfig {
            vulkan: VulkanConfig {
                mode: VulkanMode::Exchange,
                validation,
                ..VulkanConfig::default()
            },
            ..RuntimeConfig::default()
        })
        .build()
}

/// Why there is no Vulkan device, if so. Panics instead where one is required.
pub fn missing() -> Option<String> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    MISSING
        .get_or_init(|| {
            let missing = try_build(false).err().map(|error| error.to_string());
            assert!(
                missing.is_none() || std::env::var_os(REQUIRED).is_none(),
                "Vulkan is required: {missing:?}"
            );
            missing
        })
        .clone()
}

/// Whether the validation layer is installed. Panics instead where Vulkan is required.
pub fn has_validation() -> bool {
    static VALIDATION: OnceLock<bool> = OnceLock::new();
    *VALIDATION.get_or_init(|| {
        let _ = log::set_logger(&Collector);
        log::set_max_level(log::LevelFilter::Warn);
        let error = try_build(true).err().map(|error| error.to_string());
        assert!(
            error.is_none() || std::env::var_os(REQUIRED).is_none(),
            "the validation layer is required: {error:?}"
        );
        if let Some(error) = &error {
            println!("without validation: {error}");
        }
        error.is_none()
    })
}

/// Fails if the validation layer has said anything.
pub fn expect_no_validation_message() {
    let messages = std::mem::take(&mut *MESSAGES.lock().unwrap_or_else(PoisonError::into_inner));
    assert!(messages.is_empty(), "{messages:#?}");
}
