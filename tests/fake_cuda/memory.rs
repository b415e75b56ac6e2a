//! Memory: of this process, and of software Vulkan.

use super::*;

/// Bytes of each piece of memory.
pub(crate) static PIECES: Mutex<Option<HashMap<usize, Layout>>> = Mutex::new(None);

pub(crate) fn take(bytes: usize) -> Result<usize, Code> {
    if faulty(NO_MEMORY) || bytes > 1 << 30 {
        return Err(OUT_OF_MEMORY);
    }
    let layout = Layout::from_size_align(bytes.max(1), 4096).map_err(|_| INVALID_VALUE)?;
    // SAFETY: the size is not zero; memory of a driver holds anything.
    let start = unsafe {
        let start = alloc(layout);
        if start.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        start.write_bytes(0xcd, layout.size());
        start as usize
    };
    LIVE.fetch_add(1, Ordering::SeqCst);
    let mut pieces = PIECES.lock().unwrap();
    pieces.get_or_insert_default().insert(start, layout);
    Ok(start)
}

pub(crate) fn give_back(start: usize) -> Code {
    let taken = PIECES
        .lock()
        .unwrap()
        .get_or_insert_default()
        .remove(&start);
    let Some(layout) = taken else {
        return INVALID_VALUE;
    };
    LIVE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: allocated by `take` with this layout, and removed from the list.
    unsafe { dealloc(start as *mut u8, layout) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(to: *mut usize, bytes: usize, flags: c_uint) -> Code {
    tri!(ready("cuMemHostAlloc", true));
    if flags != 3 {
        eprintln!("fake CUDA: host memory that is not mapped, or write-combined: {flags}");
        return INVALID_VALUE;
    }
    let taken = tri!(take(bytes));
    // SAFETY: see above.
    unsafe { *to = taken };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    to: *mut usize,
    host: usize,
    _flags: c_uint,
) -> Code {
    // SAFETY: see above.
    unsafe { *to = host };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(start: usize) -> Code {
    tri!(ready("cuMemFreeHost", true));
    give_back(start)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(to: *mut usize, bytes: usize) -> Code {
    tri!(ready("cuMemAlloc", true));
    let taken = tri!(take(bytes));
    // SAFETY: see above.
    unsafe { *to = taken };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(start: usize) -> Code {
    tri!(ready("cuMemFree", true));
    let mut mapped = MAPPED.lock().unwrap();
    if let Some(index) = mapped.iter().position(|mapped| *mapped == start) {
        mapped.swap_remove(index);
        LIVE.fetch_sub(1, Ordering::SeqCst);
        return SUCCESS;
    }
    drop(mapped);
    give_back(start)
}

/// Memory of software Vulkan (Mesa's llvmpipe), whose file begins with its size and where it begins (`os_memory_fd.c`).
pub(crate) struct External {
    start: *mut c_void,
    length: usize,
    offset: usize,
    bytes: usize,
}

/// Where imported memory is mapped and not freed.
pub(crate) static MAPPED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`.
#[repr(C)]
pub struct HandleDescriptor {
    kind: c_int,
    /// A union of two pointers; a file descriptor is in its first word.
    handle: [u64; 2],
    bytes: u64,
    pub(crate) flags: c_uint,
    reserved: [c_uint; 16],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuImportExternalMemory(
    to: *mut *mut c_void,
    descriptor: *const HandleDescriptor,
) -> Code {
    tri!(ready("cuImportExternalMemory", true));
    // SAFETY: see above.
    let descriptor = unsafe { &*descriptor };
    if descriptor.kind != 1 || descriptor.flags != 0 || descriptor.reserved != [0; 16] {
        eprintln!("fake CUDA: not a file descriptor of Vulkan");
        return INVALID_VALUE;
    }
    if faulty(NO_IMPORT) {
        return NOT_SUPPORTED;
    }
    let fd = descriptor.handle[0] as c_int;
    let mut header = [0_usize; 2];
    // SAFETY: the buffer has the size that is asked for; the descriptor is the caller's until it is closed here, on success.
    unsafe {
        let read = libc::pread(fd, header.as_mut_ptr().cast(), size_of_val(&header), 0);
        let [bytes, offset] = header;
        if read != 16 || (bytes as u64) < descriptor.bytes {
            eprintln!(
                "fake CUDA: no memory of llvmpipe of {} bytes",
                descriptor.bytes
            );
            return INVALID_VALUE;
        }
        let length = offset + bytes;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(
            std::ptr::null_mut(),
            length,
            access,
            libc::MAP_SHARED,
            fd,
            0,
        );
        if start == libc::MAP_FAILED {
            return OUT_OF_MEMORY;
        }
        libc::close(fd);
        *to = new_handle(External {
            start,
            length,
            offset,
            bytes,
        });
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuExternalMemoryGetMappedBuffer(
    to: *mut usize,
    memory: *mut c_void,
    descriptor: *const [u64; 3],
) -> Code {
    tri!(ready("cuExternalMemoryGetMappedBuffer", true));
    // SAFETY: see above.
    let (memory, [offset, bytes, _flags]) = unsafe { (&*memory.cast::<External>(), *descriptor) };
    if offset as usize + bytes as usize > memory.bytes {
        return INVALID_VALUE;
    }
    let start = memory.start as usize + memory.offset + offset as usize;
    MAPPED.lock().unwrap().push(start);
    LIVE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: see above.
    unsafe { *to = start };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDestroyExternalMemory(memory: *mut c_void) -> Code {
    tri!(ready("cuDestroyExternalMemory", true));
    // SAFETY: see above; the mapping was made by `cuImportExternalMemory`.
    unsafe {
        let external = &*memory.cast::<External>();
        libc::munmap(external.start, external.length);
        drop_handle::<External>(memory);
    }
    SUCCESS
}
