//! Memory that is taken from the driver before kernels run: taking or freeing it later would wait for all of them to end.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUexternalMemory};
use range_alloc::RangeAllocator;

use super::bar::{Bar, BarMemory, Exported, NotGiven};
use super::driver::{CallFailed, check};
use crate::logging;
use crate::ring::WriteCombining;

/// What pieces are multiples of: more than any alignment that is needed, and a power of two.
const UNIT: u64 = 256;

/// Where an arena's memory lies.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Pinned host memory that the device maps, cached by the host.
    Host,
    /// The device's own.
    Device,
    /// The device's own, which the host maps.
    Bar(Arc<Bar>),
}

/// Why memory was not taken.
#[derive(Debug)]
pub(super) enum NotTaken {
    Driver(CallFailed),
    Vulkan(NotGiven),
}

impl From<CallFailed> for NotTaken {
    fn from(error: CallFailed) -> Self {
        Self::Driver(error)
    }
}

impl fmt::Display for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(error) => error.fmt(f),
            Self::Vulkan(error) => f.write_str(&error.reason),
        }
    }
}

/// Memory of Vulkan that was imported.
#[derive(Debug)]
struct Imported {
    raw: CUexternalMemory,
    /// Given back after CUDA has let go of it.
    _memory: BarMemory,
}

// SAFETY: a handle of the driver, which may be used by any thread that makes the context current.
unsafe impl Send for Imported {}

/// Memory of one place, in a few large chunks.
#[derive(Debug)]
pub(super) struct Arena {
    place: Place,
    chunk_bytes: u64,
    chunks: Vec<Chunk>,
}

#[derive(Debug)]
struct Chunk {
    /// Null for memory of the device.
    host: *mut u8,
    device: CUdeviceptr,
    imported: Option<Imported>,
    /// In units.
    free: RangeAllocator<u64>,
}

// SAFETY: the pointer is only handed out; whoever holds a piece of the chunk holds it exclusively.
unsafe impl Send for Chunk {}

/// A piece of an arena.
#[derive(Debug)]
pub(super) struct Piece {
    chunk: usize,
    units: Range<u64>,
    pub(super) host: Option<NonNull<u8>>,
    pub(super) device: CUdeviceptr,
}

// SAFETY: as for `Chunk`; a piece is given out once until it is given back.
unsafe impl Send for Piece {}
// SAFETY: a shared piece only shows its addresses.
unsafe impl Sync for Piece {}

impl Arena {
    /// An empty arena that grows by so many bytes.
    pub(super) fn new(place: Place, chunk_bytes: u64) -> Self {
        Self {
            place,
            chunk_bytes: chunk_bytes.max(UNIT).next_multiple_of(UNIT),
            chunks: Vec::new(),
        }
    }

    /// All of its memory, which it has no more.
    pub(super) fn take_all(&mut self) -> Self {
        Self {
            chunks: std::mem::take(&mut self.chunks),
            place: self.place.clone(),
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// How the host's stores to it are ordered: what lies behind the bus is taken for write-combined, whatever it is said to be.
    pub(super) fn write_combining(&self) -> WriteCombining {
        match &self.place {
            Place::Bar(_) => WriteCombining::Yes,
            Place::Host | Place::Device => WriteCombining::No,
        }
    }

    /// Whether no piece of it is in use.
    pub(super) fn is_unused(&self) -> bool {
        self.chunks
            .iter()
            .all(|chunk| chunk.free.allocated_ranges().next().is_none())
    }

    /// A piece of at least so many bytes, if there is one.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Piece> {
        let units = bytes.max(1).div_ceil(UNIT);
        self.chunks
            .iter_mut()
            .enumerate()
            .find_map(|(index, chunk)| {
                let units = chunk.free.allocate_range(units).ok()?;
                let offset = units.start * UNIT;
                // The range lies within the chunk, so that neither address wraps around.
                let host = NonNull::new(chunk.host.wrapping_add(offset as usize));
                Some(Piece {
                    chunk: index,
                    host: host.filter(|_| !chunk.host.is_null()),
                    device: chunk.device + offset,
                    units,
                })
            })
    }

    pub(super) fn give_back(&mut self, piece: Piece) {
        if let Some(chunk) = self.chunks.get_mut(piece.chunk) {
            chunk.free.free_range(piece.units);
        }
    }

    /// The largest piece that could be taken now.
    pub(super) fn largest(&self) -> u64 {
        let free = |chunk: &Chunk| {
            let total: u64 = chunk.free.initial_range().end;
            let used: Vec<Range<u64>> = chunk.free.allocated_ranges().collect();
            let mut largest = 0;
            let mut end = 0;
            for range in used {
                largest = largest.max(range.start.saturating_sub(end));
                end = end.max(range.end);
            }
            largest.max(total - end)
        };
        self.chunks.iter().map(free).max().unwrap_or(0) * UNIT
    }

    /// Takes one more chunk from the driver, of at least so many bytes. Waits for running kernels.
    ///
    /// # Errors
    /// Whatever the driver, or Vulkan, says. The context must be current.
    pub(super) fn grow(&mut self, bytes: u64) -> Result<(), NotTaken> {
        let bytes = bytes.max(self.chunk_bytes).next_multiple_of(UNIT);
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut host: *mut c_void = ptr::null_mut();
        let mut device: CUdeviceptr = 0;
        let mut imported = None;
        match &self.place {
            Place::Host => {
                // The driver pins what there is not, until the system ends the process.
                let granted = crate::system::memory::ask(bytes);
                if granted.is_err() {
                    check(
                        "pin host memory",
                        sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY,
                    )?;
                }
                let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
                // SAFETY: the context is current; the pointers are to locals; what was pinned is given back once.
                unsafe {
                    check(
                        "pin host memory",
                        sys::cuMemHostAlloc(&raw mut host, size, flags),
                    )?;
                    let mapped = sys::cuMemHostGetDevicePointer_v2(&raw mut device, host, 0);
                    check("map host memory", mapped).inspect_err(|_| {
                        let _ = sys::cuMemFreeHost(host);
                    })?;
                }
            }
            // SAFETY: as above.
            Place::Device => check("take device memory", unsafe {
                sys::cuMemAlloc_v2(&raw mut device, size)
            })?,
            Place::Bar(bar) => {
                let (memory, exported) = bar.take(bytes).map_err(NotTaken::Vulkan)?;
                host = memory.start().as_ptr().cast();
                let raw = import(&memory, exported, bar.is_dedicated())?;
                let all = sys::CUDA_EXTERNAL_MEMORY_BUFFER_DESC {
                    offset: 0,
                    size: bytes,
                    flags: 0,
                    reserved: [0; 16],
                };
                // SAFETY: the memory was just imported; the pointers are to locals.
                let mapped =
                    unsafe { sys::cuExternalMemoryGetMappedBuffer(&raw mut device, raw, &all) };
                check("map imported memory", mapped).inspect_err(|_| {
                    // SAFETY: nothing uses it.
                    unsafe {
                        let _ = sys::cuDestroyExternalMemory(raw);
                    }
                })?;
                imported = Some(Imported {
                    raw,
                    _memory: memory,
                });
            }
        }
        self.chunks.push(Chunk {
            host: host.cast(),
            device,
            imported,
            free: RangeAllocator::new(0..bytes / UNIT),
        });
        Ok(())
    }

    /// Gives everything back to the driver. Waits for running kernels.
    ///
    /// # Safety
    /// The context must be current, and nothing may use the arena's memory any more.
    pub(super) unsafe fn free(&mut self) {
        for chunk in self.chunks.drain(..) {
            // SAFETY: both were taken in `grow`, and are given back once.
            let freed = unsafe {
                match &self.place {
                    Place::Host => {
                        check("unpin host memory", sys::cuMemFreeHost(chunk.host.cast()))
                    }
                    Place::Device | Place::Bar(_) => {
                        check("free device memory", sys::cuMemFree_v2(chunk.device))
                    }
                }
            };
            if let Some(imported) = &chunk.imported {
                // SAFETY: as above; what was mapped of it has been freed.
                unsafe {
                    let _ = sys::cuDestroyExternalMemory(imported.raw);
                }
            }
            if let Err(error) = freed {
                logging::warning!("{error}");
            }
        }
    }
}

/// Makes memory of Vulkan known to CUDA. The context must be current.
fn import(
    memory: &BarMemory,
    exported: Exported,
    dedicated: bool,
) -> Result<CUexternalMemory, CallFailed> {
    let handle = sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC {
        type_: sys::CUexternalMemoryHandleType::CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD,
        handle: sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC_st__bindgen_ty_1 { fd: exported.fd() },
        size: memory.bytes(),
        flags: if dedicated {
            sys::CUDA_EXTERNAL_MEMORY_DEDICATED
        } else {
            0
        },
        reserved: [0; 16],
    };
    let mut raw: CUexternalMemory = ptr::null_mut();
    // SAFETY: the context is current; the descriptor is that of exported memory of this size; the pointers are to locals.
    check("import memory", unsafe {
        sys::cuImportExternalMemory(&raw mut raw, &handle)
    })?;
    // It is CUDA's now, which closes it (CUDA Driver API, `cuImportExternalMemory`).
    exported.give_away();
    Ok(raw)
}
