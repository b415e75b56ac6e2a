//! What of this machine stands in a realtime thread's way, as far as the system tells.

use std::fmt;

use super::report::Schedule;
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

/// Everything of note for a thread on these cores, scheduled so, with a device on this node.
pub(super) fn warnings(
    cores: &[usize],
    schedule: Option<Schedule>,
    node: Option<u32>,
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
    if matches!(schedule, Some(Schedule::Fifo(_) | Schedule::RoundRobin(_))) {
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
