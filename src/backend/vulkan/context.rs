//! An open Vulkan device, and what all its kernels share: allocator, layouts, pipelines, and whether it is lost.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ash::{ext, vk};
use gpu_allocator::vulkan::{Allocator, AllocatorCreateDesc};
use parking_lot::Mutex;

use super::loader::Instance;
use super::physical::Physical;
use super::{spirv, unavailable};
use crate::backend::Account;
use crate::error::Error;
use crate::kernel::ShaderSource;
use crate::logging;
use crate::thread::event_count::EventCount;

/// Bindings of the prelude: host-to-device memory, device-to-host memory, state, where replies go. As many as every device has.
pub(super) const BINDINGS: u32 = 4;

/// What a shader is specialized for: its specialization constants 0 and 1, word for word.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Specialization {
    /// Invocations of a workgroup.
    pub(super) block_size: u32,
    /// Whether they are one SIMD group of a software driver (`RK_LOCKSTEP` of the prelude): 0 or 1.
    pub(super) lockstep: u32,
}

impl Specialization {
    const ENTRIES: [vk::SpecializationMapEntry; 2] = [
        vk::SpecializationMapEntry {
            constant_id: 0,
            offset: 0,
            size: 4,
        },
        vk::SpecializationMapEntry {
            constant_id: 1,
            offset: 4,
            size: 4,
        },
    ];

    fn bytes(self) -> [u8; 8] {
        let words = u64::from(self.block_size) | u64::from(self.lockstep) << 32;
        words.to_le_bytes()
    }
}

/// What the prelude's push constants are, word for word.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct PushConstants {
    pub(super) host_to_device_words: u32,
    pub(super) device_to_host_words: u32,
    pub(super) state_words: u32,
    pub(super) capacity: u32,
    pub(super) slot_words: u32,
    pub(super) epoch: u32,
    pub(super) message_cost: u32,
    pub(super) replies: u32,
    pub(super) kinds: u32,
    pub(super) telemetry: u32,
    pub(super) next_capacity: u32,
    pub(super) next_slot_words: u32,
    pub(super) next_offset: u32,
    pub(super) two: u32,
    /// Only there for modules that can be traced.
    pub(super) trace_every: u32,
}

const PUSH_CONSTANT_BYTES: usize = size_of::<PushConstants>();

// SAFETY-relevant for `bytes`: fifteen words without padding.
const _: () = assert!(PUSH_CONSTANT_BYTES == 15 * 4);

impl PushConstants {
    pub(super) fn bytes(&self) -> [u8; PUSH_CONSTANT_BYTES] {
        let words = [
            self.host_to_device_words,
            self.device_to_host_words,
            self.state_words,
            self.capacity,
            self.slot_words,
            self.epoch,
            self.message_cost,
            self.replies,
            self.kinds,
            self.telemetry,
            self.next_capacity,
            self.next_slot_words,
            self.next_offset,
            self.two,
            self.trace_every,
        ];
        let mut bytes = [0; PUSH_CONSTANT_BYTES];
        for (out, word) in bytes.chunks_exact_mut(4).zip(words) {
            out.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// An open device.
pub(super) struct Context {
    pub(super) raw: ash::Device,
    pub(super) physical: Physical,
    pub(super) account: Arc<Account>,
    /// `None` only while the context is dropped.
    pub(super) allocator: Mutex<Option<Allocator>>,
    pub(super) names: Option<ext::debug_utils::Device>,
    /// What tells the clock of the device's timestamps.
    timestamps: Option<ext::calibrated_timestamps::Device>,
    pub(super) set_layout: vk::DescriptorSetLayout,
    pub(super) pipeline_layout: vk::PipelineLayout,
    pipelines: Mutex<HashMap<(ShaderSource, bool, Specialization), vk::Pipeline>>,
    /// Rung for the device's lanes, by whoever has something for them.
    pub(super) doorbell: Arc<EventCount>,
    /// Why the device is lost, once it is.
    lost: OnceLock<String>,
    /// Whether work is left on it that never ended.
    abandoned: AtomicBool,
    /// Outlives the device.
    instance: Arc<Instance>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("device", &self.name())
            .field("lost", &self.lost())
            .finish_non_exhaustive()
    }
}

impl Context {
    pub(super) fn open(
        instance: &Arc<Instance>,
        physical: &Physical,
        account: Arc<Account>,
    ) -> Result<Arc<Self>, Error> {
        if let Some(lacks) = &physical.lacks {
            return Err(unavailable(format!(
                "'{}' cannot be used: {lacks}",
                physical.info.name
            )));
        }
        let priorities = vec![1.0; physical.queues as usize];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(physical.family)
            .queue_priorities(&priorities)];
        let mut extensions = Vec::new();
        if physical.portability_subset {
            extensions.push(ash::khr::portability_subset::NAME.as_ptr());
        }
        if physical.tells_clock {
            extensions.push(ext::calibrated_timestamps::NAME.as_ptr());
        }
        let has_clock = physical.features.device_clock || physical.features.subgroup_clock;
        if has_clock {
            extensions.push(ash::khr::shader_clock::NAME.as_ptr());
        }
        // What handlers may use where the device has it.
        let features = vk::PhysicalDeviceFeatures::default()
            .shader_int64(physical.features.int64)
            .shader_float64(physical.features.float64);
        let mut clocks = vk::PhysicalDeviceShaderClockFeaturesKHR::default()
            .shader_device_clock(physical.features.device_clock)
            .shader_subgroup_clock(physical.features.subgroup_clock);
        let mut info = vk::DeviceCreateInfo::default()
            .enabled_features(&features)
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions);
        if has_clock {
            info = info.push_next(&mut clocks);
        }
        // SAFETY: the physical device came from this instance, its family has that many queues.
        let raw = unsafe {
            instance
                .raw()
                .create_device(physical.handle, &info, None)
                .map_err(|error| {
                    unavailable(format!(
                        "'{}' cannot be opened: {error}",
                        physical.info.name
                    ))
                })?
        };
        let allocator = Allocator::new(&AllocatorCreateDesc {
            instance: instance.raw().clone(),
            device: raw.clone(),
            physical_device: physical.handle,
            debug_settings: Default::default(),
            buffer_device_address: false,
            allocation_sizes: Default::default(),
        });
        let names = instance
            .debug_utils
            .then(|| ext::debug_utils::Device::new(instance.raw(), &raw));
        let timestamps = physical
            .tells_clock
            .then(|| ext::calibrated_timestamps::Device::new(instance.raw(), &raw));
        let mut context = Self {
            raw,
            timestamps,
            physical: physical.clone(),
            account,
            allocator: Mutex::new(None),
            names,
            set_layout: vk::DescriptorSetLayout::null(),
            pipeline_layout: vk::PipelineLayout::null(),
            pipelines: Mutex::new(HashMap::new()),
            doorbell: Arc::new(EventCount::new()),
            lost: OnceLock::new(),
            abandoned: AtomicBool::new(false),
            instance: Arc::clone(instance),
        };
        match allocator {
            Ok(allocator) => *context.allocator.lock() = Some(allocator),
            Err(error) => {
                return Err(unavailable(format!("'{}': {error}", physical.info.name)));
            }
        }
        let bindings: Vec<_> = (0..BINDINGS)
            .map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: the device is live; the bindings live until the call returns.
        context.set_layout = context.check("create a descriptor set layout", unsafe {
            context.raw.create_descriptor_set_layout(&info, None)
        })?;
        let layouts = [context.set_layout];
        let ranges = [vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::COMPUTE)
            .size(PUSH_CONSTANT_BYTES as u32)];
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(&layouts)
            .push_constant_ranges(&ranges);
        // SAFETY: as above; the set layout is this device's.
        context.pipeline_layout = context.check("create a pipeline layout", unsafe {
            context.raw.create_pipeline_layout(&info, None)
        })?;
        Ok(Arc::new(context))
    }

    pub(super) fn name(&self) -> &str {
        &self.physical.info.name
    }

    pub(super) fn out_of_memory(&self, asked: u64) -> Error {
        Error::OutOfMemory {
            device: self.name().to_owned(),
            asked,
            available: self.account.available(),
        }
    }

    /// Marks the device as lost; the first reason is kept.
    pub(super) fn lose(&self, reason: String) {
        if self.lost.set(reason).is_ok() {
            logging::error!(
                "device '{}' is lost: {}",
                self.name(),
                self.lost().unwrap_or("")
            );
        }
        // Lanes that sleep have kernels to fail.
        self.doorbell.notify();
    }

    /// Marks the device as one whose work never ends, so that nothing that it may use is ever destroyed.
    pub(super) fn abandon(&self, reason: String) {
        self.abandoned.store(true, Ordering::Release);
        self.lose(reason);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Why the device is lost, if it is.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// The error of a lost device, if it is one.
    pub(super) fn check_lost(&self) -> Result<(), Error> {
        match self.lost() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost {
                device: self.name().to_owned(),
                reason: reason.to_owned(),
            }),
        }
    }

    /// What a driver's answer means. A lost device is latched; so is one that answers what its specification does not
    /// allow it to.
    pub(super) fn check<T>(
        &self,
        operation: &'static str,
        result: Result<T, vk::Result>,
    ) -> Result<T, Error> {
        match result {
            Ok(value) => Ok(value),
            Err(vk::Result::ERROR_OUT_OF_HOST_MEMORY | vk::Result::ERROR_OUT_OF_DEVICE_MEMORY) => {
                Err(self.out_of_memory(0))
            }
            Err(error) => {
                let reason = format!("the driver failed to {operation}: {error}");
                self.lose(reason.clone());
                Err(Error::DeviceLost {
                    device: self.name().to_owned(),
                    reason,
                })
            }
        }
    }

    /// What the clock of the device's timestamps shows now, if the driver says so.
    pub(super) fn ticks(&self) -> Option<u64> {
        let wanted =
            [vk::CalibratedTimestampInfoKHR::default().time_domain(vk::TimeDomainKHR::DEVICE)];
        // SAFETY: the device is live, has the extension, and the driver named this domain.
        let (ticks, _) = unsafe {
            self.timestamps
                .as_ref()?
                .get_calibrated_timestamps(&wanted)
                .ok()?
        };
        ticks.first().copied()
    }

    /// The pipeline of a shader for this specialization, made once; one whose messages are traced or not.
    pub(super) fn pipeline(
        &self,
        kernel: &str,
        source: &ShaderSource,
        traced: bool,
        specialization: Specialization,
    ) -> Result<vk::Pipeline, Error> {
        let key = (source.clone(), traced, specialization);
        let mut pipelines = self.pipelines.lock();
        if let Some(pipeline) = pipelines.get(&key) {
            return Ok(*pipeline);
        }
        let words = match source {
            ShaderSource::Spirv(bytes) => {
                spirv::check(bytes).map_err(|reason| Error::InvalidCode {
                    kernel: kernel.to_owned(),
                    reason,
                })?
            }
            #[cfg(feature = "glsl")]
            ShaderSource::Glsl(text) => super::glsl::compile(kernel, text, traced)?,
        };
        if traced && !spirv::reads_clock(&words) {
            return Err(Error::InvalidCode {
                kernel: kernel.to_owned(),
                reason: "its module for traces was not built with -DRK_TRACES".into(),
            });
        }
        if let Some(lacks) = spirv::lacks(&words, &self.physical.features) {
            return Err(Error::InvalidCode {
                kernel: kernel.to_owned(),
                reason: format!("'{}' has no {lacks}", self.name()),
            });
        }
        let info = vk::ShaderModuleCreateInfo::default().code(&words);
        // SAFETY: the words were checked to be a module; they live until the call returns.
        let module = self.check("create a shader module", unsafe {
            self.raw.create_shader_module(&info, None)
        })?;
        let data = specialization.bytes();
        let info = vk::SpecializationInfo::default()
            .map_entries(&Specialization::ENTRIES)
            .data(&data);
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main")
            .specialization_info(&info);
        let info = [vk::ComputePipelineCreateInfo::default()
            .stage(stage)
            .layout(self.pipeline_layout)];
        // SAFETY: module and layout are this device's; everything that `info` points to lives until the call returns.
        let made = unsafe {
            self.raw
                .create_compute_pipelines(vk::PipelineCache::null(), &info, None)
        };
        // SAFETY: the module is not used by anything but the call above.
        unsafe { self.raw.destroy_shader_module(module, None) };
        let made = match made {
            Ok(made) => made,
            Err((_, vk::Result::ERROR_DEVICE_LOST)) => {
                return self.check("create a pipeline", Err(vk::Result::ERROR_DEVICE_LOST));
            }
            Err((
                _,
                vk::Result::ERROR_OUT_OF_HOST_MEMORY | vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
            )) => {
                return Err(self.out_of_memory(0));
            }
            Err((_, error)) => {
                return Err(Error::InvalidCode {
                    kernel: kernel.to_owned(),
                    reason: format!("the driver refuses it: {error}"),
                });
            }
        };
        let pipeline = made.first().copied().unwrap_or_default();
        self.set_name(
            pipeline,
            &format!("{kernel} x{}", specialization.block_size),
        );
        pipelines.insert(key, pipeline);
        Ok(pipeline)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _deferral = logging::defer();
        if self.is_abandoned() {
            // Destroying what a dispatch still uses is undefined; the process keeps it to its end.
            std::mem::forget(self.allocator.get_mut().take());
            // The driver runs that work: its instance and its library stay, too.
            std::mem::forget(Arc::clone(&self.instance));
            logging::warning!("device '{}' was left behind with work on it", self.name());
            return;
        }
        // SAFETY: every object that uses the device holds the context, and waited for its own work, so that nothing of
        // it is in use; each is destroyed once. Null handles are allowed.
        unsafe {
            for (_, pipeline) in self.pipelines.get_mut().drain() {
                self.raw.destroy_pipeline(pipeline, None);
            }
            self.raw.destroy_pipeline_layout(self.pipeline_layout, None);
            self.raw
                .destroy_descriptor_set_layout(self.set_layout, None);
            drop(self.allocator.get_mut().take());
            self.raw.destroy_device(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::layouts;

    #[test]
    fn the_prelude_has_the_layouts_of_the_host() {
        let text = include_str!("../../../shaders/ringkernel.glsl");
        let lines = text.lines();
        let mut constants = layouts::constants(lines.filter_map(|line| {
            line.strip_prefix("const uint ")?
                .split(';')
                .next()?
                .split_once(" = ")
        }));
        layouts::check(&mut constants);
        layouts::check_traces(&mut constants, false);
        // What is the loop's own, and what it says to itself.
        for name in [
            "RK_RUN",
            "RK_TERMINATE",
            "RK_STALE",
            "RK_POLLS",
            "RK_MESSAGES",
            "RK_ITERATIONS",
            "RK_LOOKS_PER_BEAT",
            "RK_LOOK_COST",
            "RK_HOUSEKEEPING_COST",
            "RK_MAX_THREADS",
            "RK_SHARED_WORDS",
        ] {
            assert!(constants.remove(name).is_some(), "{name}");
        }
        constants.retain(|name, _| !name.starts_with("RK_LEFT_"));
        assert!(constants.is_empty(), "not checked: {constants:?}");
    }

    #[test]
    fn the_prelude_has_the_push_constants_of_the_host() {
        let prelude = include_str!("../../../shaders/ringkernel.glsl");
        let names = layouts::fields(prelude, "uniform RkLaunch {");
        let debug = format!(
            "{:?}",
            PushConstants {
                host_to_device_words: 0,
                device_to_host_words: 0,
                state_words: 0,
                capacity: 0,
                slot_words: 0,
                epoch: 0,
                message_cost: 0,
                replies: 0,
                kinds: 0,
                telemetry: 0,
                next_capacity: 0,
                next_slot_words: 0,
                next_offset: 0,
                two: 0,
                trace_every: 0,
            }
        );
        let fields = layouts::debug_fields(&debug);
        assert_eq!(names, fields);
    }

    #[test]
    fn the_prelude_declares_the_version_that_is_checked() {
        let prelude = include_str!("../../../shaders/ringkernel.glsl");
        let declared = format!(
            "layout(constant_id = 31) const uint RK_LAYOUT_VERSION = {}u;",
            spirv::LAYOUT_VERSION
        );
        assert!(prelude.contains(&declared));
    }
}
