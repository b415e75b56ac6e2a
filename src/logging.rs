//! Floor 1: log records leave only while the calling thread holds no lock of ours.
//!
//! A logger is foreign code. It may call this crate: ask for a state, open a topic, launch a
//! kernel. A thread that takes locks, or calls a driver, opens a [`Deferral`] first. Records of
//! that thread then wait until the outermost one ends. All logging of this crate goes through the
//! macros here.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use log::{Level, Metadata, Record};

/// A record that waits for its thread to release its locks.
struct Waiting {
    level: Level,
    target: &'static str,
    place: Place,
    text: String,
}

/// Where a record was written.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) module: &'static str,
    pub(crate) file: &'static str,
    pub(crate) line: u32,
}

struct Queue {
    /// Deferrals that the thread has open.
    depth: usize,
    waiting: Vec<Waiting>,
}

thread_local! {
    static QUEUE: RefCell<Queue> = const {
        RefCell::new(Queue {
            depth: 0,
            waiting: Vec::new(),
        })
    };
}

/// Keeps the calling thread's records back while it lives.
///
/// Declared before the locks that it is for, so that it is dropped after them.
#[must_use = "it ends when it is dropped"]
pub(crate) struct Deferral {
    /// It belongs to the thread that opened it.
    _thread: PhantomData<*const ()>,
}

/// Keeps the calling thread's records back until the result is dropped.
pub(crate) fn defer() -> Deferral {
    // Fails only while the thread ends; records leave at once then.
    let _ = QUEUE.try_with(|queue| {
        if let Ok(mut queue) = queue.try_borrow_mut() {
            queue.depth += 1;
        }
    });
    Deferral {
        _thread: PhantomData,
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        let waiting = QUEUE.try_with(|queue| {
            let mut queue = queue.try_borrow_mut().ok()?;
            queue.depth = queue.depth.saturating_sub(1);
            (queue.depth == 0).then(|| std::mem::take(&mut queue.waiting))
        });
        let Ok(Some(waiting)) = waiting else {
            return;
        };
        for record in waiting {
            emit(
                record.level,
                record.target,
                record.place,
                format_args!("{}", record.text),
            );
        }
    }
}

/// Hands a record to the logger, now or when the thread's deferrals have ended.
#[cold]
pub(crate) fn write(
    level: Level,
    target: &'static str,
    place: Place,
    text: std::fmt::Arguments<'_>,
) {
    let is_deferred = QUEUE.try_with(|queue| queue.try_borrow().is_ok_and(|queue| queue.depth > 0));
    if is_deferred != Ok(true) {
        return emit(level, target, place, text);
    }
    // Outside the borrow: the text's parts and the allocator are not ours alone.
    let record = Waiting {
        level,
        target,
        place,
        text: text.to_string(),
    };
    let _ = QUEUE.try_with(|queue| {
        if let Ok(mut queue) = queue.try_borrow_mut() {
            queue.waiting.push(record);
        }
    });
}

/// Calls the logger. Its panic ends here: it is no failure of a kernel, nor of who controls one.
fn emit(level: Level, target: &'static str, place: Place, text: std::fmt::Arguments<'_>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let logger = log::logger();
        let metadata = Metadata::builder().level(level).target(target).build();
        if logger.enabled(&metadata) {
            logger.log(
                &Record::builder()
                    .metadata(metadata)
                    .args(text)
                    .module_path_static(Some(place.module))
                    .file_static(Some(place.file))
                    .line(Some(place.line))
                    .build(),
            );
        }
    }));
    if let Err(panic) = outcome {
        // Its destructor is the logger's code, too.
        std::mem::forget(panic);
    }
}

/// A record of this level, and this target unless that is the module.
macro_rules! record {
    (target: $target:expr, $level:expr, $($text:tt)+) => {{
        let level = $level;
        if level <= ::log::STATIC_MAX_LEVEL && level <= ::log::max_level() {
            let place = $crate::logging::Place {
                module: module_path!(),
                file: file!(),
                line: line!(),
            };
            $crate::logging::write(level, $target, place, format_args!($($text)+));
        }
    }};
    ($level:expr, $($text:tt)+) => {
        $crate::logging::record!(target: module_path!(), $level, $($text)+)
    };
}

macro_rules! error {
    ($($text:tt)+) => { $crate::logging::record!(::log::Level::Error, $($text)+) };
}

macro_rules! warning {
    ($($text:tt)+) => { $crate::logging::record!(::log::Level::Warn, $($text)+) };
}

macro_rules! info {
    ($($text:tt)+) => { $crate::logging::record!(::log::Level::Info, $($text)+) };
}

macro_rules! debug {
    ($($text:tt)+) => { $crate::logging::record!(::log::Level::Debug, $($text)+) };
}

pub(crate) use {debug, error, info, record, warning};
