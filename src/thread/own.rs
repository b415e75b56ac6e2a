//! Ending a thread from a destructor that may run on that very thread.

use std::thread::JoinHandle;

/// Whether `thread` is the calling thread, which cannot wait for its own end.
pub(crate) fn is_current<T>(thread: &JoinHandle<T>) -> bool {
    thread.thread().id() == std::thread::current().id()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_knows_its_own_handle() {
        let (give, take) = std::sync::mpsc::channel::<JoinHandle<()>>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let own = take.recv().unwrap();
            tell.send(is_current(&own)).unwrap();
        });
        assert!(!is_current(&thread));
        give.send(thread).unwrap();
        assert!(told.recv().unwrap());
    }
}
