//! Panics of handlers are told before the process's panic hook runs, which may take long: one that
//! prints a backtrace takes hundreds of milliseconds.

use std::any::Any;
use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::sync::atomic::{AtomicBool, Ordering};

use super::on_thread::panicking_handler;
use crate::kernel::{FailureReason, KernelFailure};

/// No `Once`: the child of a fork would wait for ever for a thread that was just at it.
static IS_INSTALLED: AtomicBool = AtomicBool::new(false);

/// Puts a hook before the process's panic hook, once: a hook that is set later replaces both. Not
/// on a thread that panics, which may not change hooks.
pub(crate) fn install_hook() {
    if std::thread::panicking() || IS_INSTALLED.swap(true, Ordering::Relaxed) {
        return;
    }
    let next = take_hook();
    set_hook(Box::new(move |info| {
        tell(info);
        next(info);
    }));
}

/// Fails the kernel whose handler panics. Panics nowhere, and runs no code of the crate's user: a
/// panic in a hook ends the process.
fn tell(info: &PanicHookInfo<'_>) {
    if let Some((signals, block, request)) = panicking_handler() {
        signals.fail_silently(KernelFailure {
            reason: FailureReason::Panic,
            message: message(info.payload()),
            block: Some(block),
            request: Some(request),
        });
    }
}

/// What a panic says.
pub(super) fn message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "the handler panicked with a value that is no text".into())
}
