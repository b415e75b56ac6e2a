//! What was asked for, and what came of it.

use std::fmt;
#[cfg(target_os = "linux")]
use std::io;
use std::time::Duration;

use super::machine::RealtimeWarning;

/// Something that a realtime thread is given.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Setting {
    /// To run on these cores only.
    Cores(Vec<usize>),
    /// To be scheduled so.
    Schedule(Schedule),
    /// That all memory of the process, now and later, stays in RAM (`mlockall`).
    LockedMemory,
    /// That so many bytes of its stack are present.
    Stack(usize),
    /// That so many bytes of its heap are present.
    Heap(usize),
    /// That cores sleep no deeper than what takes so long to wake from.
    WakeLatency(Duration),
    /// That denormal numbers count as zero.
    FlushToZero,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cores(cores) => write!(f, "cores {cores:?}"),
            Self::Schedule(schedule) => schedule.fmt(f),
            Self::LockedMemory => f.write_str("locked memory"),
            Self::Stack(bytes) => write!(f, "{bytes} bytes of stack"),
            Self::Heap(bytes) => write!(f, "{bytes} bytes of heap"),
            Self::WakeLatency(latency) => write!(f, "a wake-up latency of {latency:?}"),
            Self::FlushToZero => f.write_str("denormals as zero"),
        }
    }
}

/// How a thread is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Before every ordinary thread, until it waits: `SCHED_FIFO`, priority 1 (least) to 99.
    Fifo(u8),
    /// The same, in turns with others of its priority: `SCHED_RR`, priority 1 to 99.
    RoundRobin(u8),
    /// As an ordinary thread with this nice value, -20 (most) to 19.
    Nice(i8),
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fifo(priority) => write!(f, "SCHED_FIFO priority {priority}"),
            Self::RoundRobin(priority) => write!(f, "SCHED_RR priority {priority}"),
            Self::Nice(nice) => write!(f, "nice value {nice}"),
        }
    }
}

/// Whether the thread may go without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Need {
    /// It does not run without.
    Required,
    /// It runs without, and the report says so.
    #[default]
    BestEffort,
}

/// Why a setting was not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The system's error number, if it gave one.
    pub errno: Option<i32>,
    /// What it means.
    pub reason: String,
    /// The limit that stands in the way, by name and value, if one does.
    pub limit: Option<String>,
    /// How whoever runs the machine can grant it.
    pub remedy: &'static str,
}

impl Refusal {
    #[cfg(target_os = "linux")]
    pub(super) fn of(error: &io::Error, limit: Option<String>, remedy: &'static str) -> Self {
        Self {
            errno: error.raw_os_error(),
            reason: error.to_string(),
            limit,
            remedy,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if let Some(limit) = &self.limit {
            write!(f, "; {limit}")?;
        }
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// A setting, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What was asked for.
    pub setting: Setting,
    /// Whether the thread may go without.
    pub need: Need,
    /// Why not, if it was not granted.
    pub refusal: Option<Refusal>,
}

/// What a realtime thread was granted, and what else of the machine stands in its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RealtimeReport {
    /// The thread's name.
    pub thread: String,
    /// Each setting, in the order in which they were applied.
    pub grants: Vec<Grant>,
    /// What the thread cannot change, and its user should know.
    pub warnings: Vec<RealtimeWarning>,
}

impl RealtimeReport {
    /// Whether everything was granted that was asked for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.grants.iter().all(|grant| grant.refusal.is_none())
    }

    /// What was refused.
    pub fn refused(&self) -> impl Iterator<Item = (&Setting, &Refusal)> {
        self.grants
            .iter()
            .filter_map(|grant| Some((&grant.setting, grant.refusal.as_ref()?)))
    }

    /// The first refusal of a setting that is required.
    pub(super) fn fatal(&self) -> Option<&Grant> {
        self.grants
            .iter()
            .find(|grant| grant.need == Need::Required && grant.refusal.is_some())
    }
}

impl fmt::Display for RealtimeReport {
    /// A line for each setting and warning.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "realtime thread '{}'", self.thread)?;
        for grant in &self.grants {
            match &grant.refusal {
                None => write!(f, "\n  granted: {}", grant.setting)?,
                Some(refusal) => write!(f, "\n  refused: {}: {refusal}", grant.setting)?,
            }
        }
        for warning in &self.warnings {
            write!(f, "\n  warning: {warning}")?;
        }
        Ok(())
    }
}
