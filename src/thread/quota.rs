//! How much processor time the control groups of this process allow it, in cores. Linux; elsewhere
//! there is no such limit.

use std::path::{Path, PathBuf};

use crate::system;

/// Most groups between a process and the root that are looked at.
const MOST_LEVELS: usize = 64;

/// Cores' worth of time that the process may use, if a group limits it: the least over its groups
/// and their ancestors.
///
/// Reads a few files, so it is for the control plane only. What cannot be read limits nothing.
pub(super) fn cpu_quota() -> Option<f64> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let groups = read("/proc/self/cgroup".as_ref())?;
    let mounts = read("/proc/self/mountinfo".as_ref())?;
    least_quota(&groups, &mounts, &read)
}

fn read(path: &Path) -> Option<String> {
    system::read(path.to_str()?)
}

/// The two versions of control groups, which differ in their files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// As [`cpu_quota`], from the texts of the two files and whatever reads the others.
fn least_quota(groups: &str, mounts: &str, read: &impl Fn(&Path) -> Option<String>) -> Option<f64> {
    let mut least: Option<f64> = None;
    for line in groups.lines() {
        // `hierarchy:controllers:path` (cgroups(7)); version 2 has hierarchy 0 and names no
        // controllers.
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = if hierarchy == "0" && controllers.is_empty() {
            Version::Two
        } else if controllers.split(',').any(|controller| controller == "cpu") {
            Version::One
        } else {
            continue;
        };
        for (root, mount_point) in mounts.lines().filter_map(|line| mount_of(line, version)) {
            let quota = quota_below(&mount_point, &root, Path::new(path), version, read);
            least = match (least, quota) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    least
}

/// Which directory of the hierarchy is mounted, and where, if the line is about such a mount.
fn mount_of(line: &str, version: Version) -> Option<(PathBuf, PathBuf)> {
    // `36 35 98:0 /root /mount options - type source super-options` (proc_pid_mountinfo(5)).
    let (mount, file_system) = line.split_once(" - ")?;
    let mut file_system = file_system.split(' ');
    let (kind, _, options) = (
        file_system.next()?,
        file_system.next(),
        file_system.next().unwrap_or(""),
    );
    let fits = match version {
        Version::Two => kind == "cgroup2",
        Version::One => kind == "cgroup" && options.split(',').any(|option| option == "cpu"),
    };
    if !fits {
        return None;
    }
    let mut mount = mount.split(' ').skip(3);
    Some((unescaped(mount.next()?), unescaped(mount.next()?)))
}

/// A path of `mountinfo`, where blanks and the like are written as three octal digits.
fn unescaped(path: &str) -> PathBuf {
    let mut text = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        let code = after
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                text.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text.push_str(rest);
    PathBuf::from(text)
}

/// The least quota of a group and of its ancestors, as far as they are mounted.
fn quota_below(
    mount_point: &Path,
    root: &Path,
    group: &Path,
    version: Version,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<f64> {
    // In a container the mount often shows the container's own group as its root, while the path is
    // the host's: then the path does not lie below the mount, and its root is the group itself, or
    // the closest that can be seen.
    let below = group
        .strip_prefix(root)
        .or_else(|_| group.strip_prefix("/"))
        .unwrap_or(Path::new(""));
    let mut directory = mount_point.join(below);
    let mut least: Option<f64> = None;
    for _ in 0..MOST_LEVELS {
        if let Some(quota) = quota_of(&directory, version, read) {
            least = Some(least.map_or(quota, |least| least.min(quota)));
        }
        if directory == mount_point || !directory.pop() || !directory.starts_with(mount_point) {
            break;
        }
    }
    least
}

/// What one group allows, if it limits anything.
fn quota_of(
    directory: &Path,
    version: Version,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<f64> {
    let (quota, period) = match version {
        Version::Two => {
            // `quota period`, in microseconds; the quota may be `max`.
            let text = read(&directory.join("cpu.max"))?;
            let mut fields = text.split_whitespace().map(str::to_owned);
            (fields.next()?, fields.next()?)
        }
        // The quota is -1 where there is none.
        Version::One => (
            read(&directory.join("cpu.cfs_quota_us"))?,
            read(&directory.join("cpu.cfs_period_us"))?,
        ),
    };
    let quota = quota.trim().parse::<u64>().ok()?;
    let period = period
        .trim()
        .parse::<u64>()
        .ok()
        .filter(|&period| period > 0)?;
    Some(quota as f64 / period as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn least(groups: &str, mounts: &str, files: &[(&str, &str)]) -> Option<f64> {
        least_quota(groups, mounts, &|path: &Path| {
            files
                .iter()
                .find(|(name, _)| Path::new(name) == path)
                .map(|(_, text)| (*text).to_owned())
        })
    }

    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "33 32 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        34 32 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";

    #[test]
    fn the_least_quota_of_a_group_and_its_ancestors_counts_in_version_2() {
        let files = [
            ("/sys/fs/cgroup/a/b/cpu.max", "150000 100000\n"),
            ("/sys/fs/cgroup/a/cpu.max", "50000 100000\n"),
            ("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n"),
            ("/sys/fs/cgroup/other/cpu.max", "1 100000\n"),
        ];
        assert_eq!(least("0::/a/b/c\n", V2, &files), Some(0.5));
        assert_eq!(least("0::/a/b/c\n", V2, &files[..1]), Some(1.5));
        assert_eq!(least("0::/a/b/c\n", V2, &files[2..]), None);
        assert_eq!(least("0::/\n", V2, &files), None);
    }

    #[test]
    fn the_least_quota_of_a_group_and_its_ancestors_counts_in_version_1() {
        let groups = "5:cpuset:/elsewhere\n4:cpu,cpuacct:/jobs/one\n0::/\n";
        let cpu = "/sys/fs/cgroup/cpu,cpuacct";
        let quota = format!("{cpu}/jobs/cpu.cfs_quota_us");
        let period = format!("{cpu}/jobs/cpu.cfs_period_us");
        let own = format!("{cpu}/jobs/one/cpu.cfs_quota_us");
        let own_period = format!("{cpu}/jobs/one/cpu.cfs_period_us");
        let mounts = format!("{V1}{V2}");
        let mut files = vec![
            (quota.as_str(), "250000\n"),
            (period.as_str(), "100000\n"),
            (own.as_str(), "-1\n"),
            (own_period.as_str(), "100000\n"),
        ];
        assert_eq!(least(groups, &mounts, &files), Some(2.5));
        files[2].1 = "20000\n";
        assert_eq!(least(groups, &mounts, &files), Some(0.2));
    }

    #[test]
    fn a_container_finds_its_quota_below_a_mount_of_its_own_group() {
        // Version 1 without a namespace: the mount's root is the group, which the path names by the
        // host's root.
        let mounts = "9 8 0:29 /docker/1f2e /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n";
        let files = [
            ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000"),
            ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000"),
        ];
        assert_eq!(least("4:cpu:/docker/1f2e\n", mounts, &files), Some(0.5));
        // Version 2: the path is not to be seen at all, and the mount shows the group.
        let files = [("/sys/fs/cgroup/cpu.max", "75000 100000")];
        assert_eq!(
            least("0::/kubepods/pod7/1f2e\n", V2, &files),
            Some(0.75),
            "the mount's root counts"
        );
        assert_eq!(least("0::/../..\n", V2, &files), Some(0.75));
    }

    #[test]
    fn what_cannot_be_read_limits_nothing() {
        let odd = [("/sys/fs/cgroup/cpu.max", "many few")];
        assert_eq!(least("0::/\n", V2, &odd), None);
        assert_eq!(
            least("0::/\n", V2, &[("/sys/fs/cgroup/cpu.max", "5 0")]),
            None
        );
        assert_eq!(least("0::/\n", V2, &[("/sys/fs/cgroup/cpu.max", "")]), None);
        for groups in ["", "0", "0::", "::::", "x:cpu:/a\n\n"] {
            for mounts in ["", " - ", "1 2 3", "a b c d - cgroup2", V1, V2] {
                assert_eq!(least(groups, mounts, &[]), None);
            }
        }
        assert_eq!(
            unescaped(r"/a\040b\134c\9"),
            Path::new(r"/a b\c\9"),
            "blanks are octal"
        );
    }

    #[test]
    fn the_machines_own_files_can_be_read() {
        // Whatever they say.
        assert!(cpu_quota().is_none_or(|quota| quota >= 0.0));
    }
}
