//! Streams, events, launches and graphs. A launch is a thread a block.

use super::modules::{LOCAL, Module, RunBlock, local_memory_needed};
use super::*;

pub(crate) type Done = Mutex<bool>;

pub(crate) struct Stream {
    pub(crate) last: Mutex<Option<Arc<Done>>>,
    /// What is launched while a graph is recorded.
    pub(crate) captured: Mutex<Option<Vec<Job>>>,
}

pub(crate) struct Event {
    pub(crate) marks: Mutex<Weak<Done>>,
}

pub(crate) fn is_done(done: &Done) -> bool {
    *done.lock().unwrap()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> Code {
    tri!(ready("cuStreamCreate", true));
    if flags != 1 {
        eprintln!("fake CUDA: a stream that waits for the legacy one");
        return INVALID_VALUE;
    }
    let made = Stream {
        last: Mutex::new(None),
        captured: Mutex::new(None),
    };
    // SAFETY: see above.
    unsafe { *stream = new_handle(made) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamDestroy", true));
    // SAFETY: see above.
    unsafe { drop_handle::<Stream>(stream) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamQuery", false));
    if faulty(FAULTY_KERNEL) {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    match &*stream.last.lock().unwrap() {
        Some(last) if !is_done(last) => NOT_READY,
        _ => SUCCESS,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Code {
    tri!(ready("cuEventCreate", false));
    let marks = Mutex::new(Weak::new());
    // SAFETY: see above.
    unsafe { *event = new_handle(Event { marks }) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Event>(event) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> Code {
    tri!(ready("cuEventRecord", false));
    // SAFETY: see above.
    let (event, stream) = unsafe { (&*event.cast::<Event>(), &*stream.cast::<Stream>()) };
    let last = stream.last.lock().unwrap();
    *event.marks.lock().unwrap() = last.as_ref().map_or_else(Weak::new, Arc::downgrade);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: *mut c_void) -> Code {
    tri!(ready("cuEventQuery", false));
    if faulty(FAULTY_KERNEL) {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: see above.
    let event = unsafe { &*event.cast::<Event>() };
    let marks = event.marks.lock().unwrap().upgrade();
    match marks {
        Some(done) if !is_done(&done) => NOT_READY,
        _ => SUCCESS,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    threads: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Code {
    let more = local_memory_needed() > LOCAL.load(Ordering::SeqCst);
    tri!(ready("cuLaunchKernel", more));
    if stream.is_null() {
        return DEADLOCK;
    }
    // SAFETY: see above. `rk_main` has a structure of fifteen words and three addresses, the kernels of the benchmark have two
    // addresses; all are copied here.
    let (job, stream) = unsafe {
        let address = |index: usize| *(*arguments.add(index)).cast::<u64>() as usize;
        let job: Job = if function == FLAG.handle() {
            let (request, reply) = (address(0), address(1));
            Arc::new(move || run_flag(request, reply))
        } else if function == COPY.handle() {
            let (request, reply) = (address(0), address(1));
            Arc::new(move || run_copy(request, reply, threads as usize))
        } else {
            let words = *(*arguments).cast::<[u32; 15]>();
            let addresses = [1, 2, 3].map(address);
            let Some(run_block) = (*function.cast::<Module>()).run_block else {
                return NOT_FOUND;
            };
            Arc::new(move || run_blocks(run_block, words, addresses, blocks, threads))
        };
        (job, &*stream.cast::<Stream>())
    };
    let mut captured = stream.captured.lock().unwrap();
    match &mut *captured {
        Some(captured) => captured.push(job),
        None => start(stream, job),
    }
    SUCCESS
}

/// What a kernel does.
pub(crate) type Job = Arc<dyn Fn() + Send + Sync>;

/// Runs it once what was launched before on its stream is done.
pub(crate) fn start(stream: &Stream, job: Job) {
    RUNNING.fetch_add(1, Ordering::SeqCst);
    let done = Arc::new(Mutex::new(false));
    let before = stream.last.lock().unwrap().replace(Arc::clone(&done));
    std::thread::spawn(move || {
        // A GPU does not stay on its caller's core.
        // SAFETY: the set is whole; pid 0 is this thread.
        unsafe {
            let mut every: libc::cpu_set_t = std::mem::zeroed();
            (0..libc::CPU_SETSIZE as usize).for_each(|core| libc::CPU_SET(core, &mut every));
            libc::sched_setaffinity(0, size_of_val(&every), &raw const every);
        }
        while before.as_ref().is_some_and(|before| !is_done(before)) {
            std::thread::yield_now();
        }
        job();
        RUNNING.fetch_sub(1, Ordering::SeqCst);
        *done.lock().unwrap() = true;
    });
}

pub(crate) fn run_blocks(
    run_block: RunBlock,
    words: [u32; 15],
    addresses: [usize; 3],
    blocks: c_uint,
    threads: c_uint,
) {
    std::thread::scope(|scope| {
        for block in 0..blocks {
            scope.spawn(move || {
                let [requests, replies, state] = addresses.map(|at| at as *mut u32);
                let words = (&raw const words).cast();
                // SAFETY: the host holds this memory until the kernel has ended.
                unsafe { run_block(words, requests, replies, state, block, blocks, threads) };
            });
        }
    });
}

/// The kernels of `benches/placement/flag.ptx`.
pub(crate) struct Known(pub(crate) &'static CStr);
pub(crate) static FLAG: Known = Known(c"rk_flag");
pub(crate) static COPY: Known = Known(c"rk_copy");

impl Known {
    pub(crate) fn handle(&'static self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

pub(crate) fn word(at: usize) -> &'static AtomicU32 {
    // SAFETY: the host holds this memory until the kernel has ended, and uses whole words.
    unsafe { &*(at as *const AtomicU32) }
}

pub(crate) fn run_flag(request: usize, reply: usize) {
    let mut last = 0;
    while last != u32::MAX {
        let value = word(request).load(Ordering::Acquire);
        if value == last {
            std::thread::yield_now();
            continue;
        }
        last = value;
        word(reply).store(value, Ordering::Release);
    }
}

pub(crate) fn run_copy(request: usize, reply: usize, threads: usize) {
    for thread in 0..threads {
        let value = word(request + 4 * thread).load(Ordering::Relaxed);
        word(reply + 4 * thread).store(value, Ordering::Relaxed);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamSynchronize", false));
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    let last = stream.last.lock().unwrap().clone();
    while last.as_ref().is_some_and(|last| !is_done(last)) {
        std::thread::yield_now();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, _mode: c_int) -> Code {
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    *stream.captured.lock().unwrap() = Some(Vec::new());
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> Code {
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    let Some(captured) = stream.captured.lock().unwrap().take() else {
        return INVALID_VALUE;
    };
    // SAFETY: see above.
    unsafe { *graph = new_handle::<Vec<Job>>(captured) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut *mut c_void,
    graph: *mut c_void,
    _flags: u64,
) -> Code {
    // SAFETY: see above.
    unsafe { *executable = new_handle((*graph.cast::<Vec<Job>>()).clone()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: *mut c_void, stream: *mut c_void) -> Code {
    // SAFETY: see above.
    let (jobs, stream) = unsafe { (&*executable.cast::<Vec<Job>>(), &*stream.cast::<Stream>()) };
    for job in jobs {
        start(stream, Arc::clone(job));
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Vec<Job>>(graph) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Vec<Job>>(executable) };
    SUCCESS
}
