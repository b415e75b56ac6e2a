//! Atomics and blocking primitives of the code that is model-checked: `core`/`std` normally, `loom` under `--cfg loom`.

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, Ordering},
};

#[cfg(all(loom, feature = "std"))]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic::fence};

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU32, Ordering};

#[cfg(all(not(loom), feature = "std"))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic::fence};
