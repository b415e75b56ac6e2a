//! Code of the crate's user that runs where its panic must not get any further: destructors of
//! panic payloads and of what handlers captured.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Panics of payloads that are dropped one after the other, before the next one is leaked: a
/// payload's destructor may panic with a payload of the same type, without end.
const PANICS: u32 = 8;

/// Runs `code`; none if it panicked.
///
/// The panic's payload is dropped here. Its destructor may block: what others wait for is done
/// before this call.
pub(crate) fn contain<T>(code: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(code)) {
        Ok(value) => Some(value),
        Err(payload) => {
            dispose(payload);
            None
        }
    }
}

/// Drops the payload of a panic, whose destructor may panic itself.
pub(crate) fn dispose(payload: Box<dyn Any + Send>) {
    let mut payload = payload;
    for _ in 0..PANICS {
        match catch_unwind(AssertUnwindSafe(move || drop(payload))) {
            Ok(()) => return,
            Err(next) => payload = next,
        }
    }
    std::mem::forget(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Endless;

    impl Drop for Endless {
        fn drop(&mut self) {
            std::panic::resume_unwind(Box::new(Self));
        }
    }

    #[test]
    fn a_payload_whose_destructor_panics_without_end_is_given_up() {
        dispose(Box::new(Endless));
        assert_eq!(contain(|| 1), Some(1));
        assert_eq!(
            contain(|| std::panic::resume_unwind(Box::new(Endless))),
            None::<()>
        );
    }
}
