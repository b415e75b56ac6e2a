//! Floor 1: what the operating system tells of itself and grants this process. The small text files
//! in which it does are read within bounds: a container or a sandbox may have put anything in their
//! place.

pub(crate) mod limits;
pub(crate) mod memory;

use std::fs::OpenOptions;
use std::io::Read;

/// Most bytes of such a file: sixteen times what sysfs gives (one page), and enough for the list of
/// a process's mounts.
const MOST_BYTES: u64 = 1 << 20;

/// A file of the system, without the white space around its text; `None` where there is none that
/// can be read.
///
/// Never blocks, and reads no more than [`MOST_BYTES`], whatever lies at the path.
pub(crate) fn read(path: &str) -> Option<String> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path).ok()?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// A number in a file of the system.
pub(crate) fn number<T: std::str::FromStr>(path: &str) -> Option<T> {
    read(path)?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn files_without_an_end_are_read_in_part() {
        // As long as it is read, each of its bytes is zero.
        assert_eq!(
            read("/dev/zero").map(|text| text.len() as u64),
            Some(MOST_BYTES)
        );
        assert_eq!(number::<u64>("/dev/zero"), None);
        assert_eq!(read("/nowhere"), None);
        assert_eq!(read("/proc/self"), None);
    }
}
