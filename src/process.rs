//! Floor 1: what a process knows of having been forked.
//!
//! After `fork` the child has the memory of its parent and one thread. Kernels, bridges and devices
//! stay with the parent. Whatever leads to them is registered here; a handler of `pthread_atfork`
//! closes each of these objects in the child, and keeps them from ever being dropped there: no
//! destructor joins a thread or calls a driver. A page that the system clears in the child
//! (`MADV_WIPEONFORK`, Linux) tells of children that were made without such handlers.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Something that leads to threads or devices.
pub(crate) trait InChild: Send + Sync {
    /// Makes it say in the child of a fork that it is of no use there.
    ///
    /// Runs in the handler of `pthread_atfork`, where other threads no longer exist but their locks
    /// may still be held: stores to atomics and calls that are async-signal-safe only.
    fn close_in_child(&self);
}

/// How often the present process is the child of a fork, from the first registration on.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Which process an object was made in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OriginProcess {
    generation: u32,
}

impl OriginProcess {
    /// The present process.
    pub(crate) fn current() -> Self {
        prepare();
        Self {
            generation: generation(),
        }
    }

    /// Whether the object was made in another process, which has forked since. Control plane only.
    pub(crate) fn has_forked_since(self) -> bool {
        generation() != self.generation
    }
}

fn generation() -> u32 {
    look();
    GENERATION.load(Ordering::Relaxed)
}

/// Closes what was registered if this process is the child of a fork that no handler was told of.
/// Two loads.
pub(crate) fn look() {
    if page::is_wiped() {
        close_all();
    }
}

/// The registered objects. The list is changed, and walked in a child, under a lock of its own that
/// `fork` takes first.
struct Registry {
    is_locked: AtomicBool,
    objects: std::cell::UnsafeCell<Vec<Weak<dyn InChild>>>,
}

// SAFETY: `objects` is only used while `is_locked` is held.
unsafe impl Sync for Registry {}

static REGISTRY: Registry = Registry {
    is_locked: AtomicBool::new(false),
    objects: std::cell::UnsafeCell::new(Vec::new()),
};

/// Attempts to take the lock in `fork`, a pause apart: nearly a second at least. Its holder copies
/// a few words.
const ATTEMPTS: u32 = 10_000;

/// Attempts after which a thread sleeps between two: one of a realtime policy that only yields may
/// keep the holder from ever running.
const YIELDS: u32 = 100;

const NAP: Duration = Duration::from_micros(100);

/// Between two attempts to take the lock.
fn pause(attempt: u32) {
    if attempt < YIELDS {
        std::thread::yield_now();
    } else {
        std::thread::sleep(NAP);
    }
}

impl Registry {
    fn try_lock(&self) -> bool {
        !self.is_locked.swap(true, Ordering::Acquire)
    }

    fn unlock(&self) {
        self.is_locked.store(false, Ordering::Release);
    }

    /// Runs `act` under the lock. It must neither allocate nor free: allocators are foreign code.
    fn with<R>(&self, act: impl FnOnce(&mut Vec<Weak<dyn InChild>>) -> R) -> R {
        let mut attempt = 0;
        while !self.try_lock() {
            pause(attempt);
            attempt = attempt.saturating_add(1);
        }
        // SAFETY: the lock is held.
        let result = act(unsafe { &mut *self.objects.get() });
        self.unlock();
        result
    }
}

/// Has the process notice that it is forked.
///
/// No `Once`: the child of a fork would wait for ever for a thread that was just at it. The child
/// does it again then, which may install the handlers twice.
fn prepare() {
    const NOT_YET: u32 = 0;
    const DONE: u32 = u32::MAX;
    /// Or the process, a thread of which is at it. That another process has the same number, as in
    /// a namespace of its own, costs it a second.
    static PROGRESS: AtomicU32 = AtomicU32::new(NOT_YET);

    let mut progress = PROGRESS.load(Ordering::Acquire);
    let mut attempt = 0;
    while progress != DONE {
        let here = std::process::id();
        if progress == here && attempt < ATTEMPTS {
            pause(attempt);
            attempt += 1;
            progress = PROGRESS.load(Ordering::Acquire);
            continue;
        }
        let begun = PROGRESS.compare_exchange(progress, here, Ordering::Acquire, Ordering::Acquire);
        match begun {
            Ok(_) => {
                page::prepare();
                handlers::install();
                PROGRESS.store(DONE, Ordering::Release);
                return;
            }
            Err(now) => progress = now,
        }
    }
}

/// Has an object closed in the child of every later fork, and kept from being dropped there.
pub(crate) fn register<T: InChild + 'static>(object: &Arc<T>) {
    prepare();
    let weak: Weak<dyn InChild> = Arc::<T>::downgrade(object);
    let mut waiting = Some(weak);
    let mut room = Vec::new();
    loop {
        let (needed, _freed) = REGISTRY.with(|objects| {
            let dead = objects.iter_mut().find(|object| object.strong_count() == 0);
            if let Some(place) = dead {
                let freed = waiting.take().map(|new| std::mem::replace(place, new));
                return (0, freed);
            }
            if objects.len() == objects.capacity() {
                if room.capacity() <= objects.len() {
                    return (2 * objects.len() + 16, None);
                }
                room.append(objects);
                std::mem::swap(&mut room, objects);
            }
            objects.extend(waiting.take());
            (0, None)
        });
        if needed == 0 {
            return;
        }
        room = Vec::with_capacity(needed);
    }
}

thread_local! {
    /// Whether the thread took the registry's lock for the fork that it is about to make.
    static HOLDS: Cell<bool> = const { Cell::new(false) };
}

#[cfg(unix)]
/// Before a fork: no other thread changes the registry while memory is copied.
fn before_fork() {
    // The handlers may have been installed twice, see `prepare`.
    if HOLDS.try_with(Cell::get) == Ok(true) {
        return;
    }
    for attempt in 0..ATTEMPTS {
        if REGISTRY.try_lock() {
            let _ = HOLDS.try_with(|holds| holds.set(true));
            return;
        }
        pause(attempt);
    }
}

#[cfg(unix)]
/// After a fork, in the parent.
fn after_fork() {
    if HOLDS.try_with(|holds| holds.replace(false)) == Ok(true) {
        REGISTRY.unlock();
    }
}

/// In the child of a fork, whose only thread is the calling one.
fn close_all() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    page::mark();
    // A fork without handlers may find the lock held by a thread that no longer exists: what the
    // list is like then is not known. Objects still say on the control plane that they are
    // elsewhere.
    if HOLDS.try_with(|holds| holds.replace(false)) != Ok(true) && !REGISTRY.try_lock() {
        return;
    }
    // SAFETY: the lock is held.
    let objects = unsafe { &*REGISTRY.objects.get() };
    for object in objects.iter().filter_map(Weak::upgrade) {
        object.close_in_child();
        // Never dropped in this process: its destructor would wait for threads that do not exist,
        // or call a driver.
        std::mem::forget(object);
    }
    REGISTRY.unlock();
}

/// A value of this process: the child of a fork begins with a new one, whatever state the parent's
/// was in.
pub(crate) struct PerProcess<T: 'static> {
    make: fn() -> T,
    present: std::sync::atomic::AtomicPtr<Versioned<T>>,
}

struct Versioned<T> {
    generation: u32,
    value: T,
}

impl<T> fmt::Debug for PerProcess<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerProcess").finish_non_exhaustive()
    }
}

impl<T: Send + Sync> PerProcess<T> {
    pub(crate) const fn new(make: fn() -> T) -> Self {
        Self {
            make,
            present: std::sync::atomic::AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// The value. The first call in a process makes it. One load and a comparison otherwise.
    pub(crate) fn get(&self) -> &'static T {
        let generation = GENERATION.load(Ordering::Relaxed);
        // ORDERING: publish. Pairs with the exchange below.
        let mut present = self.present.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or made below and never freed.
            if let Some(versioned) = unsafe { present.as_ref() }
                && versioned.generation == generation
            {
                return &versioned.value;
            }
            let new = Box::into_raw(Box::new(Versioned {
                generation,
                value: (self.make)(),
            }));
            match self
                .present
                .compare_exchange(present, new, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => present = new,
                Err(other) => {
                    // SAFETY: made above, and no other thread has seen it.
                    drop(unsafe { Box::from_raw(new) });
                    present = other;
                }
            }
        }
    }
}

#[cfg(unix)]
mod handlers {
    extern "C" fn before_fork() {
        super::before_fork();
    }

    extern "C" fn after_fork() {
        super::after_fork();
    }

    extern "C" fn close_all() {
        super::close_all();
    }

    pub(super) fn install() {
        // SAFETY: the handlers use atomics, the thread's own cell and the lock that the first one
        // takes. Failure (no memory) leaves the cleared page.
        let _ =
            unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(close_all)) };
    }
}

#[cfg(not(unix))]
mod handlers {
    pub(super) fn install() {}
}

#[cfg(target_os = "linux")]
mod page {
    use std::ptr::null_mut;
    use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

    /// A page that is cleared in the child of a fork; null where there is no such page.
    static PAGE: AtomicPtr<AtomicU32> = AtomicPtr::new(null_mut());

    pub(super) fn prepare() {
        // SAFETY: a new mapping of a page, wherever the system likes; zeroed, and never unmapped.
        unsafe {
            let page = libc::mmap(
                null_mut(),
                size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if page == libc::MAP_FAILED {
                return;
            }
            if libc::madvise(page, size_of::<u64>(), libc::MADV_WIPEONFORK) == 0 {
                // Marked before any thread looks at it.
                page.cast::<u32>().write(1);
                PAGE.store(page.cast(), Ordering::Release);
            }
        }
    }

    fn word() -> Option<&'static AtomicU32> {
        // SAFETY: null, or a page that is never unmapped and begins with this word.
        unsafe { PAGE.load(Ordering::Acquire).as_ref() }
    }

    pub(super) fn mark() {
        if let Some(word) = word() {
            word.store(1, Ordering::Relaxed);
        }
    }

    pub(super) fn is_wiped() -> bool {
        word().is_some_and(|word| word.load(Ordering::Relaxed) == 0)
    }
}

#[cfg(not(target_os = "linux"))]
mod page {
    pub(super) fn prepare() {}

    pub(super) fn mark() {}

    pub(super) fn is_wiped() -> bool {
        false
    }
}
