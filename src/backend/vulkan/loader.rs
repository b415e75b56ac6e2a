//! The Vulkan loader and an instance, opened at run time.

use std::borrow::Cow;
use std::ffi::{CStr, c_void};
use std::fmt;

use ash::{ext, khr, vk};

use super::unavailable;
use crate::backend::VulkanConfig;
use crate::error::Error;
use crate::logging;

/// Lowest version with everything the shaders and the backend use.
pub(super) const API_VERSION: u32 = vk::API_VERSION_1_1;

const VALIDATION_LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";

/// What the validation layer says is logged under this target.
const VALIDATION_TARGET: &str = "ringkernel::vulkan::validation";

/// A Vulkan instance.
pub(super) struct Instance {
    messenger: Option<(ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    raw: ash::Instance,
    /// Whether objects can be named.
    pub(super) debug_utils: bool,
    /// Keeps the loader's library open.
    entry: ash::Entry,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("validation", &self.messenger.is_some())
            .finish_non_exhaustive()
    }
}

impl Instance {
    pub(super) fn load(config: &VulkanConfig) -> Result<Self, Error> {
        let entry = match &config.loader {
            // SAFETY: loading a library runs its initialisers; the caller names the Vulkan loader.
            Some(path) => unsafe { ash::Entry::load_from(path) },
            // SAFETY: as above, for the system's own loader.
            None => unsafe { ash::Entry::load() },
        }
        .map_err(|error| unavailable(format!("no Vulkan loader: {error}")))?;
        // SAFETY: the entry is loaded.
        let version = unsafe { entry.try_enumerate_instance_version() }
            .ok()
            .flatten()
            .unwrap_or(vk::API_VERSION_1_0);
        if version < API_VERSION {
            return Err(unavailable("the Vulkan loader is older than version 1.1"));
        }
        // SAFETY: the entry is loaded.
        let extensions = unsafe { entry.enumerate_instance_extension_properties(None) }
            .map_err(|error| unavailable(format!("the loader lists no extensions: {error}")))?;
        let has = |name: &CStr| {
            extensions
                .iter()
                .any(|extension| extension.extension_name_as_c_str() == Ok(name))
        };
        let debug_utils = has(ext::debug_utils::NAME);
        let portability = has(khr::portability_enumeration::NAME);
        let mut names = Vec::new();
        let mut flags = vk::InstanceCreateFlags::empty();
        if debug_utils {
            names.push(ext::debug_utils::NAME.as_ptr());
        }
        if portability {
            names.push(khr::portability_enumeration::NAME.as_ptr());
            flags |= vk::InstanceCreateFlags::ENUMERATE_PORTABILITY_KHR;
        }
        let mut layers = Vec::new();
        if config.validation {
            // SAFETY: the entry is loaded.
            let found = unsafe { entry.enumerate_instance_layer_properties() }.unwrap_or_default();
            if !found
                .iter()
                .any(|layer| layer.layer_name_as_c_str() == Ok(VALIDATION_LAYER))
                || !debug_utils
            {
                return Err(unavailable(
                    "validation was asked for, but VK_LAYER_KHRONOS_validation is not installed",
                ));
            }
            layers.push(VALIDATION_LAYER.as_ptr());
        }
        let application = vk::ApplicationInfo::default()
            .application_name(c"ringkernel")
            .engine_name(c"ringkernel")
            .api_version(API_VERSION);
        let mut messages = messenger_info();
        let enabled = [vk::ValidationFeatureEnableEXT::SYNCHRONIZATION_VALIDATION];
        let mut features =
            vk::ValidationFeaturesEXT::default().enabled_validation_features(&enabled);
        let mut info = vk::InstanceCreateInfo::default()
            .flags(flags)
            .application_info(&application)
            .enabled_extension_names(&names)
            .enabled_layer_names(&layers);
        if config.validation {
            info = info.push_next(&mut features).push_next(&mut messages);
        }
        // SAFETY: all pointers in `info` live until the call returns; the layers and extensions named exist.
        let raw = unsafe { entry.create_instance(&info, None) }
            .map_err(|error| unavailable(format!("no Vulkan instance: {error}")))?;
        let mut instance = Self {
            messenger: None,
            raw,
            debug_utils,
            entry,
        };
        if config.validation {
            let loader = ext::debug_utils::Instance::new(&instance.entry, &instance.raw);
            // SAFETY: the extension is enabled; the callback is a static function without user data.
            let messenger = unsafe { loader.create_debug_utils_messenger(&messenger_info(), None) }
                .map_err(|error| unavailable(format!("no validation messages: {error}")))?;
            instance.messenger = Some((loader, messenger));
        }
        Ok(instance)
    }

    pub(super) fn entry(&self) -> &ash::Entry {
        &self.entry
    }

    pub(super) fn raw(&self) -> &ash::Instance {
        &self.raw
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _deferral = logging::defer();
        // SAFETY: every device of the instance holds it, so that none is left; both are destroyed once.
        unsafe {
            if let Some((loader, messenger)) = self.messenger.take() {
                loader.destroy_debug_utils_messenger(messenger, None);
            }
            self.raw.destroy_instance(None);
        }
    }
}

fn messenger_info() -> vk::DebugUtilsMessengerCreateInfoEXT<'static> {
    vk::DebugUtilsMessengerCreateInfoEXT::default()
        .message_severity(
            vk::DebugUtilsMessageSeverityFlagsEXT::ERROR
                | vk::DebugUtilsMessageSeverityFlagsEXT::WARNING,
        )
        .message_type(
            vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION
                | vk::DebugUtilsMessageTypeFlagsEXT::PERFORMANCE,
        )
        .pfn_user_callback(Some(log_message))
}

unsafe extern "system" fn log_message(
    severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _kind: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    _user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the layer passes a valid structure for the duration of the call.
    let text = match unsafe { data.as_ref() } {
        // SAFETY: a message that is not null is a NUL-terminated string, valid during the call.
        Some(data) if !data.p_message.is_null() => unsafe {
            CStr::from_ptr(data.p_message).to_string_lossy()
        },
        _ => Cow::Borrowed("(no text)"),
    };
    let level = if severity.contains(vk::DebugUtilsMessageSeverityFlagsEXT::ERROR) {
        log::Level::Error
    } else {
        log::Level::Warn
    };
    logging::record!(target: VALIDATION_TARGET, level, "{text}");
    vk::FALSE
}
