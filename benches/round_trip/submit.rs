//! A submission a message: what a program does that keeps nothing resident. The command buffer is recorded once, host and
//! shader share coherent memory; only submission and wait remain.

use std::ffi::c_void;
use std::ptr::NonNull;

use ash::vk;
use ringkernel::thread::affinity::pin_current_thread;

use crate::Failure;
use crate::shared::TIMEOUT;

/// A device with one recorded dispatch, for messages of one size.
pub struct Submitter {
    device: ash::Device,
    instance: ash::Instance,
    queue: vk::Queue,
    commands: vk::CommandBuffer,
    command_pool: vk::CommandPool,
    fence: vk::Fence,
    pipeline: vk::Pipeline,
    pipeline_layout: vk::PipelineLayout,
    set_layout: vk::DescriptorSetLayout,
    descriptor_pool: vk::DescriptorPool,
    buffers: [Mapped; 2],
    /// Whether to ask the fence again and again instead of sleeping until it is signalled.
    polls: bool,
    _entry: ash::Entry,
}

#[derive(Clone, Copy)]
struct Mapped {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    start: NonNull<c_void>,
}

// SAFETY: the pointers reach mapped memory that belongs to the submitter alone.
unsafe impl Send for Submitter {}

impl Submitter {
    /// Opens the device of this name, from a thread on the driver's cores: its own threads stay there.
    pub fn open(
        name: &str,
        bytes: usize,
        driver_core: usize,
        polls: bool,
    ) -> Result<Self, Failure> {
        std::thread::scope(|scope| {
            let opened = scope.spawn(|| {
                pin_current_thread(driver_core).map_err(|error| error.to_string())?;
                // SAFETY: nothing else of Vulkan is used by this object; see `make`.
                unsafe { Self::make(name, bytes, polls) }.map_err(|error| error.to_string())
            });
            let opened = opened.join().map_err(|_| "the driver panicked")?;
            Ok(opened?)
        })
    }

    /// # Safety
    /// Every handle is used as Vulkan's specification says: made here, used by one thread, destroyed in `drop`.
    unsafe fn make(name: &str, bytes: usize, polls: bool) -> Result<Self, Failure> {
        // SAFETY: as this function's.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None)?;
            let physical = instance
                .enumerate_physical_devices()?
                .into_iter()
                .find(|device| {
                    let properties = instance.get_physical_device_properties(*device);
                    properties
                        .device_name_as_c_str()
                        .is_ok_and(|own| own.to_string_lossy() == name)
                })
                .ok_or("the device is gone")?;
            let family = instance
                .get_physical_device_queue_family_properties(physical)
                .iter()
                .position(|family| family.queue_flags.contains(vk::QueueFlags::COMPUTE))
                .ok_or("no compute queue")? as u32;
            let queues = [vk::DeviceQueueCreateInfo::default()
                .queue_family_index(family)
                .queue_priorities(&[1.0])];
            let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues);
            let device = instance.create_device(physical, &info, None)?;
            let types = instance.get_physical_device_memory_properties(physical);
            let buffers = [
                Mapped::new(&device, &types, bytes)?,
                Mapped::new(&device, &types, bytes)?,
            ];

            let bindings: Vec<_> = (0..2)
                .map(|binding| {
                    vk::DescriptorSetLayoutBinding::default()
                        .binding(binding)
                        .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                        .descriptor_count(1)
                        .stage_flags(vk::ShaderStageFlags::COMPUTE)
                })
                .collect();
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let set_layout = device.create_descriptor_set_layout(&info, None)?;
            let ranges = [vk::PushConstantRange::default()
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
                .size(4)];
            let layouts = [set_layout];
            let info = vk::PipelineLayoutCreateInfo::default()
                .set_layouts(&layouts)
                .push_constant_ranges(&ranges);
            let pipeline_layout = device.create_pipeline_layout(&info, None)?;
            let words = ash::util::read_spv(&mut std::io::Cursor::new(include_bytes!(
                "../shaders/copy.spv"
            )))?;
            let info = vk::ShaderModuleCreateInfo::default().code(&words);
            let module = device.create_shader_module(&info, None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main");
            let info = [vk::ComputePipelineCreateInfo::default()
                .stage(stage)
                .layout(pipeline_layout)];
            let pipeline = device
                .create_compute_pipelines(vk::PipelineCache::null(), &info, None)
                .map_err(|(_, error)| error)?[0];
            device.destroy_shader_module(module, None);

            let sizes = [vk::DescriptorPoolSize::default()
                .ty(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(2)];
            let info = vk::DescriptorPoolCreateInfo::default()
                .max_sets(1)
                .pool_sizes(&sizes);
            let descriptor_pool = device.create_descriptor_pool(&info, None)?;
            let info = vk::DescriptorSetAllocateInfo::default()
                .descriptor_pool(descriptor_pool)
                .set_layouts(&layouts);
            let set = device.allocate_descriptor_sets(&info)?[0];
            for (binding, mapped) in (0..).zip(&buffers) {
                let info = [vk::DescriptorBufferInfo::default()
                    .buffer(mapped.buffer)
                    .range(vk::WHOLE_SIZE)];
                let write = vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(&info);
                device.update_descriptor_sets(&[write], &[]);
            }

            let info = vk::CommandPoolCreateInfo::default().queue_family_index(family);
            let command_pool = device.create_command_pool(&info, None)?;
            let info = vk::CommandBufferAllocateInfo::default()
                .command_pool(command_pool)
                .command_buffer_count(1);
            let commands = device.allocate_command_buffers(&info)?[0];
            device.begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())?;
            device.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, pipeline);
            device.cmd_bind_descriptor_sets(
                commands,
                vk::PipelineBindPoint::COMPUTE,
                pipeline_layout,
                0,
                &[set],
                &[],
            );
            let words = (bytes as u32 / 4).to_ne_bytes();
            device.cmd_push_constants(
                commands,
                pipeline_layout,
                vk::ShaderStageFlags::COMPUTE,
                0,
                &words,
            );
            device.cmd_dispatch(commands, 1, 1, 1);
            let barrier = [vk::MemoryBarrier::default()
                .src_access_mask(vk::AccessFlags::SHADER_WRITE)
                .dst_access_mask(vk::AccessFlags::HOST_READ)];
            device.cmd_pipeline_barrier(
                commands,
                vk::PipelineStageFlags::COMPUTE_SHADER,
                vk::PipelineStageFlags::HOST,
                vk::DependencyFlags::empty(),
                &barrier,
                &[],
                &[],
            );
            device.end_command_buffer(commands)?;
            Ok(Self {
                queue: device.get_device_queue(family, 0),
                fence: device.create_fence(&vk::FenceCreateInfo::default(), None)?,
                device,
                instance,
                commands,
                command_pool,
                pipeline,
                pipeline_layout,
                set_layout,
                descriptor_pool,
                buffers,
                polls,
                _entry: entry,
            })
        }
    }

    /// One message there and back.
    #[inline]
    pub fn exchange<const N: usize>(
        &mut self,
        payload: &[u8; N],
        reply: &mut [u8; N],
    ) -> Result<(), Failure> {
        let commands = [self.commands];
        let submits = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: both buffers have `N` bytes or more, and no dispatch is running; the fence is unsignalled.
        unsafe {
            self.buffers[0]
                .start
                .cast::<[u8; N]>()
                .write_unaligned(*payload);
            self.device.queue_submit(self.queue, &submits, self.fence)?;
            while self.polls && !self.device.get_fence_status(self.fence)? {
                std::hint::spin_loop();
            }
            self.device
                .wait_for_fences(&[self.fence], true, TIMEOUT.as_nanos() as u64)?;
            self.device.reset_fences(&[self.fence])?;
            *reply = self.buffers[1].start.cast::<[u8; N]>().read_unaligned();
        }
        Ok(())
    }
}

impl Mapped {
    /// # Safety
    /// As for `Submitter::make`.
    unsafe fn new(
        device: &ash::Device,
        types: &vk::PhysicalDeviceMemoryProperties,
        bytes: usize,
    ) -> Result<Self, Failure> {
        // SAFETY: as this function's.
        unsafe {
            let info = vk::BufferCreateInfo::default()
                .size(bytes as u64)
                .usage(vk::BufferUsageFlags::STORAGE_BUFFER);
            let buffer = device.create_buffer(&info, None)?;
            let needs = device.get_buffer_memory_requirements(buffer);
            let find = |wanted: vk::MemoryPropertyFlags| {
                types
                    .memory_types_as_slice()
                    .iter()
                    .enumerate()
                    .position(|(index, kind)| {
                        needs.memory_type_bits & (1 << index) != 0
                            && kind.property_flags.contains(wanted)
                    })
            };
            let coherent =
                vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let index = find(coherent | vk::MemoryPropertyFlags::HOST_CACHED)
                .or_else(|| find(coherent))
                .ok_or("no host-visible memory")?;
            let info = vk::MemoryAllocateInfo::default()
                .allocation_size(needs.size)
                .memory_type_index(index as u32);
            let memory = device.allocate_memory(&info, None)?;
            device.bind_buffer_memory(buffer, memory, 0)?;
            let start =
                device.map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())?;
            Ok(Self {
                buffer,
                memory,
                start: NonNull::new(start).ok_or("memory is mapped at null")?,
            })
        }
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        // SAFETY: no dispatch is running; each object is destroyed once, before the device and the instance.
        unsafe {
            let _ = self.device.device_wait_idle();
            self.device.destroy_fence(self.fence, None);
            self.device.destroy_command_pool(self.command_pool, None);
            self.device
                .destroy_descriptor_pool(self.descriptor_pool, None);
            self.device.destroy_pipeline(self.pipeline, None);
            self.device
                .destroy_pipeline_layout(self.pipeline_layout, None);
            self.device
                .destroy_descriptor_set_layout(self.set_layout, None);
            for mapped in self.buffers {
                self.device.destroy_buffer(mapped.buffer, None);
                self.device.free_memory(mapped.memory, None);
            }
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}
