//! Threads of our own whose end is waited for with a bound.
//!
//! `JoinHandle::join` waits for the destructors of the thread's thread-local values as well, which
//! belong to the crate's user or to a driver, and `JoinHandle::is_finished` does not tell of them.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::foreign;
use crate::time::Deadline;

/// Between two looks whether a thread has ended.
const LOOK: Duration = Duration::from_micros(100);

thread_local! {
    /// What the calling thread sets when it is done, if it is one of ours. Without a destructor:
    /// destructors of other thread-local values may still ask.
    static OWN: Cell<*const End> = const { Cell::new(std::ptr::null()) };
}

/// What a thread tells of its end.
#[derive(Debug, Default)]
struct End {
    /// Its body has returned, or panicked.
    done: AtomicBool,
    panicked: AtomicBool,
    /// The destructors of its thread-local values have run.
    #[cfg(not(any(target_os = "linux", windows)))]
    gone: AtomicBool,
}

/// A thread of our own. Dropping it leaves the thread to itself.
#[derive(Debug)]
pub(crate) struct BoundedThread {
    name: String,
    /// `None` once the thread has been joined.
    handle: Option<JoinHandle<()>>,
    end: Arc<End>,
}

/// How a join ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Join {
    /// The thread is gone.
    Ended,
    /// The thread is gone; its body panicked.
    Panicked,
    /// The thread is still there: where it is.
    LeftBehind(&'static str),
}

impl BoundedThread {
    /// Starts a thread that runs `body`, whose panic ends there.
    pub(crate) fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let end = Arc::new(End::default());
        let told = Arc::clone(&end);
        let handle = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                OWN.set(Arc::as_ptr(&told));
                // First, so that its destructor runs last.
                #[cfg(not(any(target_os = "linux", windows)))]
                last::announce(Arc::clone(&told));
                if foreign::contain(body).is_none() {
                    told.panicked.store(true, Ordering::Relaxed);
                }
                // A thread that sees it sees `panicked` as well.
                told.done.store(true, Ordering::Release);
            })?;
        Ok(Self {
            name,
            handle: Some(handle),
            end,
        })
    }

    /// The thread's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the calling thread is this one.
    pub(crate) fn is_current(&self) -> bool {
        OWN.get() == Arc::as_ptr(&self.end)
    }

    /// Whether its body has returned, or panicked.
    pub(crate) fn is_done(&self) -> bool {
        self.end.done.load(Ordering::Acquire)
    }

    /// Waits until the thread is gone, but not beyond the deadline, and not on the thread itself.
    pub(crate) fn join(&mut self, deadline: Deadline) -> Join {
        while !self.is_gone() {
            if self.is_current() {
                return Join::LeftBehind("it is the calling thread");
            }
            if deadline.has_passed() {
                return Join::LeftBehind(if self.is_done() {
                    "in the destructor of a thread-local value"
                } else {
                    "it does not end"
                });
            }
            std::thread::sleep(LOOK.min(deadline.remaining()));
        }
        if self.end.panicked.load(Ordering::Relaxed) {
            Join::Panicked
        } else {
            Join::Ended
        }
    }

    /// Whether the thread is gone; joins it then.
    fn is_gone(&mut self) -> bool {
        let Some(handle) = self.handle.take() else {
            return true;
        };
        if !self.is_done() {
            self.handle = Some(handle);
            return false;
        }
        match join_now(handle, &self.end) {
            Ok(()) => true,
            Err(handle) => {
                self.handle = Some(handle);
                false
            }
        }
    }
}

/// Joins a thread whose body is done if that does not wait, else gives it back.
#[cfg(target_os = "linux")]
fn join_now(handle: JoinHandle<()>, end: &End) -> Result<(), JoinHandle<()>> {
    use std::os::unix::thread::JoinHandleExt;

    if OWN.get() == std::ptr::from_ref(end) {
        return Err(handle);
    }
    // SAFETY: the handle vouches for a thread that has been neither joined nor detached. No result
    // is asked for.
    let joined = unsafe { libc::pthread_tryjoin_np(handle.as_pthread_t(), std::ptr::null_mut()) };
    if joined == 0 {
        // It is joined: the handle must not detach it. What else the handle holds is given back.
        let _ = handle.into_pthread_t();
        return Ok(());
    }
    Err(handle)
}

/// Joins a thread whose body is done if that does not wait, else gives it back.
#[cfg(windows)]
fn join_now(handle: JoinHandle<()>, _end: &End) -> Result<(), JoinHandle<()>> {
    use std::os::windows::io::AsRawHandle;

    #[link(name = "kernel32")]
    unsafe extern "system" {
        fn WaitForSingleObject(handle: *mut core::ffi::c_void, milliseconds: u32) -> u32;
    }
    // SAFETY: the handle is open as long as `handle` lives; a wait of no time has no other
    // precondition.
    if unsafe { WaitForSingleObject(handle.as_raw_handle(), 0) } != 0 {
        return Err(handle);
    }
    // The thread has ended, its destructors included. Its body's panic was contained.
    let _ = handle.join();
    Ok(())
}

/// Joins a thread whose body is done if that does not wait, else gives it back. What C libraries
/// registered with `pthread_key_create` is waited for all the same.
#[cfg(not(any(target_os = "linux", windows)))]
fn join_now(handle: JoinHandle<()>, end: &End) -> Result<(), JoinHandle<()>> {
    if OWN.get() == std::ptr::from_ref(end) || !end.gone.load(Ordering::Acquire) {
        return Err(handle);
    }
    // Its body's panic was contained.
    let _ = handle.join();
    Ok(())
}

#[cfg(not(any(target_os = "linux", windows)))]
mod last {
    //! A thread-local value whose destructor runs after those of all that the thread touches later.

    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::End;

    struct Last(Arc<End>);

    impl Drop for Last {
        fn drop(&mut self) {
            self.0.gone.store(true, Ordering::Release);
        }
    }

    thread_local! {
        static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
    }

    pub(super) fn announce(end: Arc<End>) {
        LAST.set(Some(Last(end)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn spawn(body: impl FnOnce() + Send + 'static) -> BoundedThread {
        crate::time::initialise();
        BoundedThread::spawn("test".into(), body).unwrap()
    }

    /// Blocks until its sender is gone.
    struct Blocking(mpsc::Receiver<()>);

    impl Drop for Blocking {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    thread_local! {
        static BLOCKING: Cell<Option<Blocking>> = const { Cell::new(None) };
    }

    #[test]
    fn a_join_does_not_wait_for_a_thread_local_destructor_beyond_its_deadline() {
        let (open, gate) = mpsc::channel();
        let mut thread = spawn(move || BLOCKING.set(Some(Blocking(gate))));
        let begin = std::time::Instant::now();
        let join = thread.join(Deadline::after(Duration::from_millis(50)));
        assert!(begin.elapsed() < LONG / 2);
        assert!(matches!(join, Join::LeftBehind(place) if place.contains("thread-local")));
        assert!(thread.is_done());
        drop(open);
        assert_eq!(thread.join(Deadline::after(LONG)), Join::Ended);
        assert_eq!(thread.join(Deadline::after(LONG)), Join::Ended);
    }

    #[test]
    fn a_panic_of_the_body_is_told_by_the_join() {
        let mut thread = spawn(|| std::panic::resume_unwind(Box::new(())));
        assert_eq!(thread.join(Deadline::after(LONG)), Join::Panicked);
    }

    #[test]
    fn a_thread_does_not_wait_for_itself() {
        let (give, take) = mpsc::channel::<BoundedThread>();
        let (tell, told) = mpsc::channel();
        let thread = spawn(move || {
            let mut own = take.recv().unwrap();
            let _ = tell.send((own.is_current(), own.join(Deadline::after(LONG * 10))));
        });
        assert!(!thread.is_current());
        give.send(thread).unwrap();
        let (is_current, join) = told.recv_timeout(LONG).unwrap();
        assert!(is_current);
        assert!(matches!(join, Join::LeftBehind(_)));
    }
}
