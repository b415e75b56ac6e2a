//! Calls into drivers that may take long, on threads of their own: threads that a driver starts
//! inherit the cores of the thread that calls it, and a driver that never returns must not keep its
//! caller.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::affinity::prefer_cores;
use super::bounded::{BoundedThread, Join};
use crate::error::Error;
use crate::logging;
use crate::time::Deadline;

/// How long a driver may take to open. Seconds are usual where it compiles code.
const OPEN_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the end of the thread is waited for once it has given its result: destructors of the
/// driver's thread-local values.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs `body` on a thread of its own, which may run on `cores` only (anywhere, with a warning, if
/// it may not). Waits two minutes at most: then the thread is left behind, and what it makes is
/// dropped there.
///
/// # Errors
/// Those of `body`; [`Error::Os`] if there can be no thread, if `body` panics, or if it does not
/// return in time.
pub(crate) fn on_cores<T: Send + 'static>(
    name: &'static str,
    cores: Vec<usize>,
    body: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    within(OPEN_TIMEOUT, name, cores, body)
}

fn within<T: Send + 'static>(
    timeout: Duration,
    name: &'static str,
    cores: Vec<usize>,
    body: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |source| Error::Os {
        operation: "open a driver on a thread of its own",
        source,
    };
    let (tell, told) = sync_channel(1);
    let mut thread = BoundedThread::spawn(name.into(), move || {
        if let Err(error) = prefer_cores(&cores) {
            logging::warning!("{name}: driver threads run anywhere: {error}");
        }
        // If the caller has stopped waiting, the result is dropped here.
        let _ = tell.send(body());
    })
    .map_err(failed)?;
    match told.recv_timeout(timeout) {
        Ok(result) => {
            if let Join::LeftBehind(place) = thread.join(Deadline::after(END_TIMEOUT)) {
                logging::warning!("{name}: the thread was left behind {place}");
            }
            result
        }
        Err(RecvTimeoutError::Timeout) => {
            let reason = format!("it does not return within {timeout:?}");
            Err(failed(io::Error::new(io::ErrorKind::TimedOut, reason)))
        }
        Err(RecvTimeoutError::Disconnected) => Err(failed(io::Error::other("it panicked"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn run<T: Send + 'static>(
        timeout: Duration,
        body: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        crate::time::initialise();
        within(timeout, "rk-test", Vec::new(), body)
    }

    #[test]
    fn a_driver_that_does_not_return_does_not_keep_its_caller() {
        let (open, gate) = mpsc::channel::<()>();
        let begin = Instant::now();
        let result = run(Duration::from_millis(50), move || {
            let _ = gate.recv();
            Ok(())
        });
        assert!(begin.elapsed() < LONG);
        assert!(
            matches!(&result, Err(Error::Os { source, .. })
                if source.kind() == io::ErrorKind::TimedOut),
            "{result:?}"
        );
        drop(open);
    }

    #[test]
    fn what_a_driver_gives_or_how_it_fails_reaches_the_caller() {
        assert_eq!(run(LONG, || Ok(7)).unwrap(), 7);
        let panicked = run::<()>(LONG, || std::panic::resume_unwind(Box::new(())));
        assert!(matches!(&panicked, Err(Error::Os { source, .. })
            if source.kind() == io::ErrorKind::Other));
        let refused = run::<()>(LONG, || {
            Err(Error::InvalidOption {
                option: "test",
                reason: String::new(),
            })
        });
        assert!(matches!(refused, Err(Error::InvalidOption { .. })));
    }
}
