//! Metal on this CPU, for tests: a compiler and a GPU that run the very sources of kernels behind the prelude of Metal. It keeps to
//! Metal's rules: one queue's command buffers run one after the other, and keep what they use.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::api::{Description, Done, Gpu, Pipeline, Queue, Shared, Slice};

/// What is to fail.
pub(super) const NO_MEMORY: u32 = 1;
/// Every command buffer fails.
pub(super) const FAILING: u32 = 2;
/// Command buffers are never done.
pub(super) const HANGING: u32 = 3;
/// A slice does not see what the host writes after it began.
pub(super) const BLIND: u32 = 4;
pub(super) const NO_DEVICES: u32 = 5;
pub(super) const NO_QUEUE: u32 = 6;
pub(super) const NO_COMMAND_BUFFER: u32 = 7;
/// The compiler is older than memory that is coherent with the host.
pub(super) const OLD_COMPILER: u32 = 8;
/// Command buffers fail while several slices of the probe's kernel are committed: until somebody changes his ways.
pub(super) const FAILING_PROBE: u32 = 9;

pub(super) static FAULT: AtomicU32 = AtomicU32::new(0);
/// Slices that ran.
pub(super) static SLICES: AtomicUsize = AtomicUsize::new(0);
/// Buffers that are not freed.
pub(super) static BUFFERS: AtomicUsize = AtomicUsize::new(0);
/// Slices that are committed and not done.
pub(super) static COMMITTED: AtomicUsize = AtomicUsize::new(0);

fn faulty(fault: u32) -> bool {
    FAULT.load(Ordering::SeqCst) == fault
}

pub(super) fn gpus() -> Vec<Arc<dyn Gpu>> {
    if faulty(NO_DEVICES) || Command::new("c++").arg("--version").output().is_err() {
        return Vec::new();
    }
    (0..2)
        .map(|index| Arc::new(Device { index }) as Arc<dyn Gpu>)
        .collect()
}

#[derive(Debug)]
struct Device {
    index: u64,
}

impl Gpu for Device {
    fn describe(&self) -> Description {
        Description {
            name: format!("Fake Metal {}", self.index),
            registry_id: 100 + self.index,
            unified_memory: true,
            working_set_bytes: 1 << 30,
            max_buffer_bytes: 1 << 28,
            max_threads: 1024,
            removable: false,
        }
    }

    fn buffer(&self, bytes: usize) -> Option<Box<dyn Shared>> {
        if faulty(NO_MEMORY) {
            return None;
        }
        Some(Box::new(Buffer(Arc::new(Memory::new(bytes)))))
    }

    fn pipeline(&self, source: &str) -> Result<Box<dyn Pipeline>, String> {
        if faulty(OLD_COMPILER) && source.starts_with("#define RK_SYSTEM_SCOPE\n") {
            return Err("handler: unknown attribute 'coherent'".into());
        }
        Ok(Box::new(Library {
            run_block: compile(source)?,
        }))
    }

    fn queue(&self, _label: &str) -> Option<Box<dyn Queue>> {
        (!faulty(NO_QUEUE)).then(|| Box::new(CommandQueue::new()) as Box<dyn Queue>)
    }
}

/// Words, on lines of their own.
#[derive(Debug)]
struct Memory {
    lines: NonNull<Line>,
    count: usize,
}

#[derive(Clone, Copy)]
#[repr(align(128))]
struct Line(#[allow(dead_code)] [u8; 128]);

// SAFETY: plain memory, which host and kernels share by the protocol of the rings.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Self {
        BUFFERS.fetch_add(1, Ordering::SeqCst);
        let lines = vec![Line([0xcd; 128]); bytes.div_ceil(128).max(1)].into_boxed_slice();
        let count = lines.len();
        let lines = NonNull::from(Box::leak(lines)).cast();
        Self { lines, count }
    }

    /// What it holds at this moment.
    fn copy(&self) -> Vec<u32> {
        let words = self.count * size_of::<Line>() / 4;
        (0..words)
            // SAFETY: the words are within the memory; others write them at the same time, by whole words.
            .map(|word| unsafe {
                let word = self.lines.cast::<AtomicU32>().add(word);
                word.as_ref().load(Ordering::Acquire)
            })
            .collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        BUFFERS.fetch_sub(1, Ordering::SeqCst);
        let lines = NonNull::slice_from_raw_parts(self.lines, self.count);
        // SAFETY: leaked by `new`, given back once.
        drop(unsafe { Box::from_raw(lines.as_ptr()) });
    }
}

#[derive(Debug)]
struct Buffer(Arc<Memory>);

impl Shared for Buffer {
    fn start(&self) -> NonNull<u8> {
        self.0.lines.cast()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

type RunBlock =
    unsafe extern "C" fn(*const c_void, *mut u32, *mut u32, *mut u32, c_uint, c_uint, c_uint);

#[derive(Debug)]
struct Library {
    run_block: RunBlock,
}

impl Pipeline for Library {
    fn max_threads(&self) -> u32 {
        512
    }

    // Each thread is a context of its own here.
    fn simd_width(&self) -> u32 {
        2
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Compiles a library for this CPU, once: its function, or the compiler's log.
fn compile(source: &str) -> Result<RunBlock, String> {
    static KNOWN: Mutex<Option<HashMap<String, RunBlock>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap();
    let known = known.get_or_insert_default();
    if let Some(run_block) = known.get(source) {
        return Ok(*run_block);
    }
    // A library of the same path would be the one that is open already.
    let folder = format!("rk-metal-{}-{}", std::process::id(), known.len());
    let folder = std::env::temp_dir().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    let compiled = compile_in(&folder, source);
    std::fs::remove_dir_all(&folder).unwrap();
    let run_block = compiled?;
    known.insert(source.to_owned(), run_block);
    Ok(run_block)
}

fn compile_in(folder: &Path, source: &str) -> Result<RunBlock, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let (text, library) = (folder.join("kernel.metal"), folder.join("kernel.so"));
    std::fs::write(&text, source).unwrap();
    let output = Command::new("c++")
        .args(["-std=c++17", "-O2", "-shared", "-fPIC"])
        .args(["-ffp-contract=off", "-w", "-I"])
        .arg(root.join("tests/on_cpu"))
        .arg(format!("-DRK_SOURCE=\"{}\"", text.display()))
        .arg(root.join("tests/on_cpu/block.cpp"))
        .arg("-o")
        .arg(&library)
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library was just made of `block.cpp`, whose function has this type; it is never closed.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "the library cannot be opened");
        let run_block = libc::dlsym(library, c"rk_run_block".as_ptr());
        assert!(!run_block.is_null(), "the library has no function");
        Ok(std::mem::transmute::<*mut c_void, RunBlock>(run_block))
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A queue, with the thread that runs its command buffers one after the other.
#[derive(Debug)]
struct CommandQueue {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    pending: Arc<AtomicUsize>,
}

impl CommandQueue {
    fn new() -> Self {
        let (work, queued) = channel::<Work>();
        let thread = std::thread::spawn(move || {
            for work in queued {
                work();
            }
        });
        Self {
            work: Some(work),
            thread: Some(thread),
            pending: Arc::new(AtomicUsize::new(0)),
        }
    }
}

impl Drop for CommandQueue {
    fn drop(&mut self) {
        drop(self.work.take());
        // What is committed goes on by itself, as a system's queue would.
        if self.pending.load(Ordering::SeqCst) == 0
            && let Some(thread) = self.thread.take()
        {
            thread.join().unwrap();
        }
    }
}

impl Queue for CommandQueue {
    fn commit(&self, slice: &Slice<'_>, done: Done) -> Result<(), String> {
        if faulty(NO_COMMAND_BUFFER) {
            return Err("no command buffer".into());
        }
        let memory = slice.buffers.map(|buffer| {
            let buffer: &Buffer = buffer.as_any().downcast_ref().unwrap();
            Arc::clone(&buffer.0)
        });
        let library: &Library = slice.pipeline.as_any().downcast_ref().unwrap();
        let run_block = library.run_block;
        let launch: Vec<u32> = bytemuck::cast_slice(slice.launch).to_vec();
        let (blocks, threads) = (slice.blocks, slice.threads);
        let pending = Arc::clone(&self.pending);
        let pending_now = pending.fetch_add(1, Ordering::SeqCst) + 1;
        COMMITTED.fetch_add(1, Ordering::SeqCst);
        let work: Work = Box::new(move || {
            // A real one would be ended by the system; until then nothing is heard of it.
            while faulty(HANGING) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            // Two are committed at once in resident mode only.
            let failing = faulty(FAILING) || (faulty(FAILING_PROBE) && pending_now > 1);
            if !failing {
                run(run_block, &launch, &memory, blocks, threads);
            }
            drop(memory);
            SLICES.fetch_add(1, Ordering::SeqCst);
            COMMITTED.fetch_sub(1, Ordering::SeqCst);
            pending.fetch_sub(1, Ordering::SeqCst);
            done(match failing {
                true => Err("a command buffer failed: it took too long (2): fake".into()),
                false => Ok(()),
            });
        });
        let queue = self.work.as_ref().unwrap();
        queue.send(work).map_err(|_| "no thread".to_owned())
    }
}

fn run(run_block: RunBlock, launch: &[u32], memory: &[Arc<Memory>; 3], blocks: u32, threads: u32) {
    let mut copy = faulty(BLIND).then(|| memory[0].copy());
    let requests = match &mut copy {
        Some(copy) => copy.as_mut_ptr(),
        None => memory[0].lines.as_ptr().cast(),
    } as usize;
    let [replies, state] =
        [&memory[1], &memory[2]].map(|memory| memory.lines.as_ptr().cast::<u32>() as usize);
    std::thread::scope(|scope| {
        for block in 0..blocks {
            scope.spawn(move || {
                let [requests, replies, state] =
                    [requests, replies, state].map(|start| start as *mut u32);
                let words = launch.as_ptr().cast();
                // SAFETY: the memory lives until all blocks have ended; `RkLaunch` is fourteen words.
                unsafe { run_block(words, requests, replies, state, block, blocks, threads) };
            });
        }
    });
}
