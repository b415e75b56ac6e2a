//! What of this machine stands in a realtime thread's way, as far as the system tells.

use std::fmt;

use super::report::Schedule;
use crate::system::limits::{Resource, limits};
use crate::thread::affinity::parse_core_list;

/// Something that a thread cannot change.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RealtimeWarning {
    /// Other threads may be put on the thread's core.
    NotIsolated {
        /// The core.
        core: usize,
        /// Cores that are isolated.
        isolated: Vec<usize>,
    },
    /// The timer interrupts the core although only one thread runs on it.
    Ticking {
        /// The core.
        core: usize,
    },
    /// Another hardware thread shares the core's execution units.
    Sibling {
        /// The core.
        core: usize,
        /// The other one.
        sibling: usize,
    },
    /// The thread's cores are not on the node that was named, that of its device.
    OtherNode {
        /// The node.
        node: u32,
        /// Its cores.
        cores: Vec<usize>,
    },
    /// A realtime thread that never waits is stopped for part of each period (`sched_rt_runtime_us`).
    Throttled {
        /// Microseconds that realtime threads may run in each period.
        runtime_us: i64,
        /// The period, in microseconds.
        period_us: i64,
    },
    /// A realtime thread that runs for so long without waiting is sent a signal that ends the
    /// process (`RLIMIT_RTTIME`).
    TimeLimit {
        /// Microseconds until SIGXCPU, which is sent again each second; if there is such a limit.
        soft_us: Option<u64>,
        /// Microseconds until SIGKILL, if there is such a limit.
        hard_us: Option<u64>,
    },
    /// All memory of the process stays in RAM (`mlockall`), which is limited (`RLIMIT_MEMLOCK`) and
    /// not for a process with CAP_IPC_LOCK: what is mapped beyond it fails, allocations and stacks
    /// of new threads included.
    LockedMemoryLimit {
        /// Bytes that the process may have, all together.
        limit: u64,
    },
    /// The core's clock may slow down.
    Governor {
        /// The core.
        core: usize,
        /// What governs its frequency.
        governor: String,
    },
    /// The kernel may be inside a critical section for long.
    NotPreemptible {
        /// What it says of itself.
        kernel: String,
    },
}

impl fmt::Display for RealtimeWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotIsolated { core, isolated } => write!(
                f,
                "other threads may run on core {core} (isolated cores: {isolated:?}): boot with isolcpus={core}"
            ),
            Self::Ticking { core } => write!(
                f,
                "the timer interrupts core {core} even while one thread runs alone on it: boot with nohz_full={core}"
            ),
            Self::Sibling { core, sibling } => write!(
                f,
                "core {sibling} shares the execution units of core {core}: keep it idle, or turn it off"
            ),
            Self::OtherNode { node, cores } => {
                write!(
                    f,
                    "the device is on NUMA node {node}, whose cores are {cores:?}"
                )
            }
            Self::Throttled {
                runtime_us,
                period_us,
            } => write!(
                f,
                "a thread that never waits is stopped for {} us in each {period_us} us: set /proc/sys/kernel/sched_rt_runtime_us to -1",
                period_us - runtime_us
            ),
            Self::TimeLimit { soft_us, hard_us } => {
                f.write_str("a thread that runs without waiting ends the process:")?;
                if let Some(soft) = soft_us {
                    write!(f, " SIGXCPU after {soft} us,")?;
                }
                if let Some(hard) = hard_us {
                    write!(f, " SIGKILL after {hard} us,")?;
                }
                f.write_str(
                    " by RLIMIT_RTTIME: raise it (LimitRTTIME= of a service, RealtimeKit's rttime-usec-max)",
                )
            }
            Self::LockedMemoryLimit { limit } => write!(
                f,
                "allocations and new threads fail once the process has {limit} bytes of memory, all of it locked: raise RLIMIT_MEMLOCK, or grant CAP_IPC_LOCK"
            ),
            Self::Governor { core, governor } => write!(
                f,
                "the frequency of core {core} is governed by '{governor}': set it to 'performance'"
            ),
            Self::NotPreemptible { kernel } => write!(
                f,
                "the kernel is not fully preemptible ({kernel}): PREEMPT_RT bounds what it may take"
            ),
        }
    }
}

/// A small file of the system; empty where there is none.
fn read(path: &str) -> String {
    crate::system::read(path).unwrap_or_default()
}

/// The cores in a list of the system, of those that are `online`.
fn cores_in(path: &str, online: &[usize]) -> Vec<usize> {
    let mut cores = parse_core_list(&read(path));
    cores.retain(|core| online.binary_search(core).is_ok());
    cores
}

/// Whether the calling thread may lock as much memory as it likes (capabilities(7), CAP_IPC_LOCK).
fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    read("/proc/thread-self/status")
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 != 0)
}

/// What the limit of locked memory means to a process all of whose memory is locked.
fn locked_limit(limit: Option<u64>, may_lock_all: bool) -> Option<RealtimeWarning> {
    let limit = limit.filter(|_| !may_lock_all)?;
    Some(RealtimeWarning::LockedMemoryLimit { limit })
}

/// Everything of note for a thread on these cores, scheduled so, with a device on this node, in a
/// process whose memory stays in RAM or does not.
pub(super) fn warnings(
    cores: &[usize],
    schedule: Option<Schedule>,
    node: Option<u32>,
    locks_memory: bool,
) -> Vec<RealtimeWarning> {
    let mut warnings = Vec::new();
    if !cfg!(target_os = "linux") {
        return warnings;
    }
    let online = &crate::thread::affinity::online_cores();
    // By the kernel's command line, and by partitions of cpusets.
    let mut isolated = cores_in("/sys/devices/system/cpu/isolated", online);
    isolated.extend(cores_in("/sys/fs/cgroup/cpuset.cpus.isolated", online));
    isolated.sort_unstable();
    isolated.dedup();
    let tickless = cores_in("/sys/devices/system/cpu/nohz_full", online);
    for &core in cores {
        if !isolated.contains(&core) {
            warnings.push(RealtimeWarning::NotIsolated {
                core,
                isolated: isolated.clone(),
            });
        }
        if !tickless.contains(&core) {
            warnings.push(RealtimeWarning::Ticking { core });
        }
        let cpu = format!("/sys/devices/system/cpu/cpu{core}");
        let siblings = cores_in(&format!("{cpu}/topology/thread_siblings_list"), online);
        warnings.extend(
            siblings
                .into_iter()
                .filter(|sibling| *sibling != core)
                .map(|sibling| RealtimeWarning::Sibling { core, sibling }),
        );
        let governor = read(&format!("{cpu}/cpufreq/scaling_governor"));
        if !governor.is_empty() && governor != "performance" {
            warnings.push(RealtimeWarning::Governor { core, governor });
        }
    }
    if let Some(node) = node {
        let path = format!("/sys/devices/system/node/node{node}/cpulist");
        let near = cores_in(&path, online);
        if !near.is_empty() && !cores.iter().all(|core| near.contains(core)) {
            warnings.push(RealtimeWarning::OtherNode { node, cores: near });
        }
    }
    if locks_memory {
        let (limit, _) = limits(Resource::LockedMemory);
        warnings.extend(locked_limit(limit, may_lock_all()));
    }
    if matches!(schedule, Some(Schedule::Fifo(_) | Schedule::RoundRobin(_))) {
        let (soft_us, hard_us) = limits(Resource::RealtimeTime);
        if soft_us.or(hard_us).is_some() {
            warnings.push(RealtimeWarning::TimeLimit { soft_us, hard_us });
        }
        let number = |path| read(path).parse::<i64>().ok();
        if let (Some(runtime_us), Some(period_us)) = (
            number("/proc/sys/kernel/sched_rt_runtime_us"),
            number("/proc/sys/kernel/sched_rt_period_us"),
        ) && runtime_us >= 0
            && runtime_us < period_us
        {
            warnings.push(RealtimeWarning::Throttled {
                runtime_us,
                period_us,
            });
        }
        // The file is of the kernel's realtime branch alone.
        let preemptible = read("/sys/kernel/realtime") == "1"
            || read("/proc/sys/kernel/version").contains("PREEMPT_RT");
        if !preemptible {
            let kernel = read("/proc/sys/kernel/osrelease");
            warnings.push(RealtimeWarning::NotPreemptible { kernel });
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_locked_memory_is_told_to_those_whom_it_binds() {
        assert_eq!(locked_limit(None, false), None);
        assert_eq!(locked_limit(None, true), None);
        assert_eq!(locked_limit(Some(5), true), None);
        let warning = locked_limit(Some(5), false).unwrap();
        assert_eq!(warning, RealtimeWarning::LockedMemoryLimit { limit: 5 });
        assert!(warning.to_string().contains("RLIMIT_MEMLOCK"));
    }
}
