//! How much memory this process may still take: the least of what the machine, its control groups
//! and the process itself have left. Linux maps more than there is, and ends a process that then
//! writes to it: so it is asked before.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::limits::{Resource, limits};
use super::{number, read};
use crate::process::PerProcess;

/// Less than this is taken without asking.
const UNASKED: u64 = 1 << 20;

/// Most bytes that are left to everything else.
const MOST_MARGIN: u64 = 256 << 20;

/// Fewest bytes that are left to everything else, of a process that has few.
const LEAST_MARGIN: u64 = 1 << 20;

/// Limits of control groups from here on stand for "none".
const UNLIMITED: u64 = 1 << 60;

/// Bytes that were taken without asking since it was asked last.
static TAKEN_UNASKED: AtomicU64 = AtomicU64::new(0);

/// Bytes that were granted, and may not have been written to yet. Threads that write to them stay
/// with the parent of a fork.
static GRANTED: PerProcess<AtomicU64> = PerProcess::new(|| AtomicU64::new(0));

/// Where memory is booked that this process takes for a device.
pub(crate) trait MemoryAccount: Send + Sync + fmt::Debug {
    /// Books `bytes`, unless that would exceed the limit.
    fn take(&self, bytes: u64) -> bool;

    /// Gives back what was taken.
    fn give_back(&self, bytes: u64);
}

/// Leave to write to so many bytes of new memory; to be dropped once they are written to.
#[derive(Debug)]
pub(crate) struct Grant {
    bytes: u64,
    /// The count that they are part of.
    granted: &'static AtomicU64,
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.granted.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Asks for leave to write to `bytes` of new memory. Reads some small files of the system, for
/// amounts that matter.
///
/// # Errors
/// How many bytes there are, if they are fewer.
pub(crate) fn ask(bytes: u64) -> Result<Grant, u64> {
    // Two that ask at once are both refused if there is only room for one: the system ends a
    // process that takes too much.
    let granted = GRANTED.get();
    let before = granted.fetch_add(bytes, Ordering::Relaxed);
    let grant = Grant { bytes, granted };
    let unasked = TAKEN_UNASKED
        .fetch_add(bytes, Ordering::Relaxed)
        .saturating_add(bytes);
    if unasked < UNASKED {
        return Ok(grant);
    }
    TAKEN_UNASKED.store(0, Ordering::Relaxed);
    match left() {
        Some(left) if before.saturating_add(bytes).saturating_add(margin(bytes)) > left => {
            Err(left.saturating_sub(before))
        }
        _ => Ok(grant),
    }
}

/// What is left to everything else when `bytes` are taken: a quarter more, up to a 32nd of all.
fn margin(bytes: u64) -> u64 {
    let share = (total() / 32).clamp(LEAST_MARGIN, MOST_MARGIN);
    (bytes / 4).min(share)
}

/// Bytes of memory that this process could ever have: the least of the machine's, its control
/// groups' and its own limit. `u64::MAX` where the system does not tell.
pub(crate) fn total() -> u64 {
    let groups = Group::of_this_process();
    let own = [Resource::AddressSpace, Resource::Data].map(|resource| limits(resource).0);
    groups
        .iter()
        .filter_map(Group::limit)
        .chain(own.into_iter().flatten())
        .chain(machine())
        .min()
        .unwrap_or(u64::MAX)
}

/// Bytes of memory that this process can still have; `None` where the system does not tell.
fn left() -> Option<u64> {
    let groups = Group::of_this_process();
    let status = read("/proc/self/status").unwrap_or_default();
    let own = [
        (Resource::AddressSpace, "VmSize"),
        (Resource::Data, "VmData"),
    ]
    .map(|(resource, field)| {
        let used = kibibytes(&status, field).unwrap_or(0);
        limits(resource).0.map(|limit| limit.saturating_sub(used))
    });
    let available = read("/proc/meminfo").and_then(|meminfo| kibibytes(&meminfo, "MemAvailable"));
    groups
        .iter()
        .filter_map(Group::left)
        .chain(own.into_iter().flatten())
        .chain(available)
        .min()
}

/// The machine's memory.
fn machine() -> Option<u64> {
    #[cfg(unix)]
    {
        // SAFETY: `sysconf` has no preconditions; it gives -1 for what it does not know.
        let (pages, page) = unsafe {
            (
                libc::sysconf(libc::_SC_PHYS_PAGES),
                libc::sysconf(libc::_SC_PAGESIZE),
            )
        };
        if let (Ok(pages), Ok(page)) = (u64::try_from(pages), u64::try_from(page))
            && pages > 0
        {
            return Some(pages.saturating_mul(page));
        }
    }
    None
}

/// The bytes in a line such as `MemAvailable:  5 kB`.
fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let number = line.trim().strip_suffix("kB")?.trim();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// A control group that limits memory, as its files tell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    folder: String,
    /// Whether it is of the unified hierarchy (version 2).
    is_unified: bool,
}

impl Group {
    /// Those of this process, up to the root of what it sees.
    fn of_this_process() -> Vec<Self> {
        match (read("/proc/self/cgroup"), read("/proc/self/mountinfo")) {
            (Some(memberships), Some(mounts)) => Self::all(&memberships, &mounts),
            _ => Vec::new(),
        }
    }

    /// From the texts of `/proc/self/cgroup` (cgroups(7)) and `/proc/self/mountinfo` (proc(5)).
    fn all(memberships: &str, mounts: &str) -> Vec<Self> {
        let mut groups = Vec::new();
        for line in memberships.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
                continue;
            };
            let is_unified = controllers.is_empty();
            if !is_unified && !controllers.split(',').any(|name| name == "memory") {
                continue;
            }
            let Some((root, mounted)) = mounts.lines().find_map(|line| mount(line, is_unified))
            else {
                continue;
            };
            // A group outside of what is mounted here is not seen.
            let below = match path.strip_prefix(root.trim_end_matches('/')) {
                Some(below)
                    if (below.is_empty() || below.starts_with('/'))
                        && !below.split('/').any(|part| part == "..") =>
                {
                    below
                }
                _ => "",
            };
            let mut folder = format!("{mounted}{}", below.trim_end_matches('/'));
            while folder.len() >= mounted.len() {
                groups.push(Self {
                    folder: folder.clone(),
                    is_unified,
                });
                folder.truncate(folder.rfind('/').unwrap_or(0));
            }
        }
        groups
    }

    fn number(&self, file: &str) -> Option<u64> {
        number(&format!("{}/{file}", self.folder))
    }

    fn limit(&self) -> Option<u64> {
        let files: &[&str] = match self.is_unified {
            // At `high` it is not ended, but slowed down until it hardly moves.
            true => &["memory.max", "memory.high"],
            false => &["memory.limit_in_bytes"],
        };
        files
            .iter()
            .filter_map(|file| self.number(file))
            .filter(|limit| *limit < UNLIMITED)
            .min()
    }

    fn left(&self) -> Option<u64> {
        let limit = self.limit()?;
        let (usage, prefix) = match self.is_unified {
            true => ("memory.current", ""),
            false => ("memory.usage_in_bytes", "total_"),
        };
        let used = self.number(usage)?;
        let statistics = read(&format!("{}/memory.stat", self.folder)).unwrap_or_default();
        // Contents of files, and what the kernel knows of them (version 2 tells): it drops both
        // when it needs the memory.
        let cached: u64 = ["inactive_file", "active_file", "slab_reclaimable"]
            .iter()
            .filter_map(|field| {
                statistics.lines().find_map(|line| {
                    let rest = line.strip_prefix(prefix)?.strip_prefix(field)?;
                    rest.strip_prefix(' ')?.parse::<u64>().ok()
                })
            })
            .fold(0, u64::saturating_add);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    }
}

/// Root and mount point in a line of `mountinfo`, if it is of the hierarchy that limits memory.
fn mount(line: &str, is_unified: bool) -> Option<(&str, &str)> {
    let (place, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    let (kind, options) = (system.next()?, system.nth(1)?);
    let is_it = match is_unified {
        true => kind == "cgroup2",
        false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    let mut place = place.split(' ').skip(3);
    is_it.then_some((place.next()?, place.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(memberships: &str, mounts: &str) -> Vec<String> {
        Group::all(memberships, mounts)
            .into_iter()
            .map(|group| group.folder)
            .collect()
    }

    #[test]
    fn groups_are_found_up_to_the_root_of_what_is_mounted() {
        let unified = "30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(
            folders("0::/user.slice/a.scope", unified),
            [
                "/sys/fs/cgroup/user.slice/a.scope",
                "/sys/fs/cgroup/user.slice",
                "/sys/fs/cgroup"
            ]
        );
        // In a namespace of its own, and outside of what its namespace shows.
        assert_eq!(folders("0::/", unified), ["/sys/fs/cgroup"]);
        assert_eq!(folders("0::/../b", unified), ["/sys/fs/cgroup"]);
        let first = "33 25 0:28 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        assert_eq!(
            folders("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x/y", first),
            ["/sys/fs/cgroup/memory/y", "/sys/fs/cgroup/memory"]
        );
        // Beside what is mounted.
        assert_eq!(
            folders("4:memory:/docker/xy", first),
            ["/sys/fs/cgroup/memory"]
        );
        for nonsense in ["", "x", "::", "0::", "4:memory", "\0", "4:memory:/a\n0::/b"] {
            assert_eq!(folders(nonsense, "- - -\n 1 2 - cgroup2"), [""; 0]);
        }
    }

    #[test]
    fn fields_are_read_and_nonsense_is_none() {
        let text = "MemTotal: 9 kB\nMemAvailable:     5 kB\n";
        assert_eq!(kibibytes(text, "MemAvailable"), Some(5 * 1024));
        for nonsense in [
            "MemAvailable: kB",
            "MemAvailable: 18446744073709551615 kB",
            "",
        ] {
            assert_eq!(kibibytes(nonsense, "MemAvailable"), None);
        }
    }

    #[test]
    fn what_the_system_can_drop_is_left_to_a_group() {
        let folder = std::env::temp_dir().join(format!("rk-group-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (file, text) in [
            ("memory.max", "1000\n"),
            ("memory.high", "max\n"),
            ("memory.current", "900\n"),
            (
                "memory.stat",
                "anon 100\ninactive_file 300\nactive_file 200\nslab_reclaimable 250\nslab 300\n",
            ),
        ] {
            std::fs::write(folder.join(file), text).unwrap();
        }
        let group = Group {
            folder: folder.to_str().unwrap().to_owned(),
            is_unified: true,
        };
        let left = group.left();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(left, Some(850));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_left_is_known_and_more_is_refused() {
        assert!(left().unwrap() <= total());
        let left = ask(u64::MAX / 2).unwrap_err();
        assert!(left < u64::MAX / 2);
        drop(ask(UNASKED).unwrap());
    }
}
