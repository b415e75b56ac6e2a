//! Which cores there are, and putting a thread on one of them.
//!
//! What can be had is asked of the system each time: a container's files may tell of other cores
//! than it has, its cpuset may change while the process runs, and a sandbox may refuse to place
//! threads.

use crate::error::Error;
use crate::system;

#[cfg(target_os = "linux")]
use super::core_mask::{CoreMask, inherited};

/// Core numbers are below this. Larger ones are not of a core.
#[cfg(target_os = "linux")]
use super::core_mask::MOST_CORES;
#[cfg(not(target_os = "linux"))]
const MOST_CORES: usize = 1 << 16;

/// Bytes of stack of a thread that asks what can be had.
#[cfg(target_os = "linux")]
const PROBE_STACK: usize = 64 * 1024;

/// The cores that are online, by number, isolated ones included: those that the system lists, and
/// those that this process has ([`usable_cores`]), which a container's list may leave out.
///
/// May read `/sys` and start a thread; for the control plane only.
#[must_use]
pub fn online_cores() -> Vec<usize> {
    let mut cores = usable_cores();
    if let Some(list) = system::read("/sys/devices/system/cpu/online") {
        cores.extend(parse_core_list(&list));
        cores.sort_unstable();
        cores.dedup();
    }
    cores
}

/// The cores that kernels are put on when the user names none: those that this process could use
/// now.
///
/// On Linux these are the ones that the calling thread or the process's main thread may run on, or
/// could run on before `main` began, as far as the process's cpuset still has them. A thread that
/// pinned itself before it built the runtime, be it the main thread, therefore does not drag its
/// kernels along. Where the system refuses to place threads, they are the calling thread's cores.
///
/// May start a thread; for the control plane only. Empty where the system tells nothing.
#[must_use]
pub fn usable_cores() -> Vec<usize> {
    now_usable()
}

#[cfg(not(target_os = "linux"))]
fn now_usable() -> Vec<usize> {
    listed_cores()
}

#[cfg(target_os = "linux")]
fn now_usable() -> Vec<usize> {
    // The main thread's id is the process id.
    let main = libc::pid_t::try_from(std::process::id()).unwrap_or(0);
    let current = current_affinity();
    let mut wanted = current.clone();
    wanted.extend(affinity_of(main));
    wanted.extend(inherited::cores());
    wanted.sort_unstable();
    wanted.dedup();
    if wanted.is_empty() {
        return listed_cores();
    }
    // A thread that this one starts may run where this one may, for certain; elsewhere it has to be
    // tried.
    if wanted == current {
        return current;
    }
    match probe(&wanted) {
        Some(found) if !found.is_empty() => found,
        _ if current.is_empty() => wanted,
        _ => current,
    }
}

/// Which of `wanted` a thread that this one starts may run on now, as a thread finds out; if none,
/// or if it may not choose, those that it may run on anyway. `None` if there can be no thread, or
/// the system does not tell.
#[cfg(target_os = "linux")]
fn probe(wanted: &[usize]) -> Option<Vec<usize>> {
    let mask = CoreMask::of(wanted)?;
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("rk-probe".into())
            .stack_size(PROBE_STACK)
            .spawn_scoped(scope, || {
                let _ = mask.apply();
                CoreMask::of_thread(0).ok().map(|mask| mask.cores())
            })
            .ok()?
            .join()
            .ok()?
    })
}

/// The [`usable_cores`] without the reserved ones; all of them if that would leave none.
pub(crate) fn unreserved_cores(reserved: &[usize]) -> Vec<usize> {
    let usable = usable_cores();
    let cores: Vec<usize> = usable
        .iter()
        .copied()
        .filter(|core| !reserved.contains(core))
        .collect();
    if cores.is_empty() { usable } else { cores }
}

/// Those of `cores`, which were usable once, that still are; the [`unreserved_cores`] if none is.
/// None of none.
pub(crate) fn still_usable(cores: &[usize], reserved: &[usize]) -> Vec<usize> {
    if cores.is_empty() {
        return Vec::new();
    }
    let usable = usable_cores();
    let still: Vec<usize> = cores
        .iter()
        .copied()
        .filter(|core| usable.contains(core))
        .collect();
    if still.is_empty() {
        unreserved_cores(reserved)
    } else {
        still
    }
}

/// The cores that the calling thread may run on; empty where the system does not tell.
#[must_use]
pub fn current_affinity() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    return affinity_of(0);
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// The cores that a thread of this process may run on, by its number in the system; empty where
/// that does not tell.
#[cfg(target_os = "linux")]
pub(super) fn affinity_of(thread: libc::pid_t) -> Vec<usize> {
    CoreMask::of_thread(thread).map_or_else(|_| Vec::new(), |mask| mask.cores())
}

/// Fails unless the core exists: unless the system lists it, this process has it, or a thread of it
/// can be put there.
///
/// May read `/sys` and start a thread; for the control plane only.
///
/// # Errors
/// [`Error::CoreNotFound`].
pub fn check_core(core: usize) -> Result<(), Error> {
    check_cores(&[core])
}

/// As [`check_core`], of each of them.
pub(crate) fn check_cores(cores: &[usize]) -> Result<(), Error> {
    if cores.is_empty() {
        return Ok(());
    }
    let available = online_cores();
    for &core in cores {
        #[cfg(target_os = "linux")]
        let exists =
            available.contains(&core) || probe(&[core]).is_some_and(|found| found == [core]);
        #[cfg(not(target_os = "linux"))]
        let exists = available.contains(&core);
        if !exists {
            return Err(Error::CoreNotFound { core, available });
        }
    }
    Ok(())
}

/// Fails unless a thread of this process can be put on the core now, as a thread finds out. On
/// other systems than Linux: unless the core exists.
///
/// # Errors
/// [`Error::CoreNotFound`], [`Error::PinningFailed`]; [`Error::Os`] if there can be no thread.
pub(crate) fn try_core(core: usize) -> Result<(), Error> {
    check_core(core)?;
    #[cfg(target_os = "linux")]
    on_thread("rk-probe", || pin_current_thread(core))??;
    Ok(())
}

/// Puts the calling thread on one core, and reads back that it is there (on Linux; elsewhere the system's word counts).
///
/// # Errors
/// [`Error::CoreNotFound`] if there is no such core, [`Error::PinningFailed`] if the thread may not run there: the core is
/// not in the process's cpuset, or the system refuses to place threads. The thread then runs where it did before.
///
/// ```
/// use ringkernel::{Error, thread::affinity};
/// let core = affinity::current_affinity().first().copied().unwrap_or(0);
/// affinity::pin_current_thread(core)?;
/// assert!(matches!(affinity::pin_current_thread(100_000), Err(Error::CoreNotFound { .. })));
/// # Ok::<(), Error>(())
/// ```
pub fn pin_current_thread(core: usize) -> Result<(), Error> {
    #[cfg(target_os = "linux")]
    return match confine_current_thread(&[core]) {
        Ok(()) => Ok(()),
        Err(error) => {
            let available = online_cores();
            Err(if available.contains(&core) {
                error
            } else {
                Error::CoreNotFound { core, available }
            })
        }
    };
    #[cfg(not(target_os = "linux"))]
    {
        check_core(core)?;
        if core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
            return Ok(());
        }
        Err(Error::PinningFailed {
            cores: vec![core],
            reason: "the system refused it".into(),
        })
    }
}

/// Lets the calling thread run on any of `cores`, which the user named, and on no other.
///
/// # Errors
/// [`Error::PinningFailed`] if the thread may not run on every one of them; it then runs where it did before.
#[cfg(target_os = "linux")]
pub(crate) fn confine_current_thread(cores: &[usize]) -> Result<(), Error> {
    let before = CoreMask::of_thread(0);
    let found = set_current(cores)?;
    if !found.is_empty() && !cores.iter().all(|core| found.contains(core)) {
        if let Ok(before) = before {
            let _ = before.apply();
        }
        return Err(Error::PinningFailed {
            cores: cores.to_vec(),
            reason: format!("of these, the process may use {found:?}"),
        });
    }
    Ok(())
}

/// Lets the calling thread run on those of `cores`, which this crate chose, that can be had now,
/// and on no other. Nothing is asked for if `cores` is empty. Does nothing where the system has no
/// such call.
///
/// # Errors
/// [`Error::PinningFailed`] if that changed nothing: none of them can be had, or the system refuses to place threads. The
/// thread then runs where it did before, which is a warning's worth to those who call this.
pub(crate) fn prefer_cores(cores: &[usize]) -> Result<(), Error> {
    #[cfg(target_os = "linux")]
    if !cores.is_empty() {
        return match set_current(cores) {
            Ok(_) => Ok(()),
            Err(error) => {
                let found = current_affinity();
                let is_there = !found.is_empty() && found.iter().all(|core| cores.contains(core));
                if is_there { Ok(()) } else { Err(error) }
            }
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
    Ok(())
}

/// Asks for these cores, and gives those that the calling thread has then; empty if the system does
/// not tell.
#[cfg(target_os = "linux")]
fn set_current(cores: &[usize]) -> Result<Vec<usize>, Error> {
    let failed = |reason| Error::PinningFailed {
        cores: cores.to_vec(),
        reason,
    };
    let mask = CoreMask::of(cores)
        .ok_or_else(|| failed(format!("numbers of cores are below {MOST_CORES}")))?;
    match mask.apply() {
        Ok(()) => Ok(current_affinity()),
        Err(error) => Err(failed(match error.raw_os_error() {
            Some(libc::EINVAL) => {
                format!("{error}: none of them is online and in the process's cpuset")
            }
            Some(libc::EPERM) => format!("{error}: a sandbox refuses to place threads"),
            _ => error.to_string(),
        })),
    }
}

/// Runs `body`, which does not block, on a thread of its own.
///
/// # Errors
/// [`Error::Os`] if there can be no thread, or `body` panics.
#[cfg(target_os = "linux")]
fn on_thread<T: Send>(name: &'static str, body: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let failed = |source| Error::Os {
        operation: "run a thread for a moment",
        source,
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn_scoped(scope, body)
            .map_err(failed)?
            .join()
            .map_err(|_| failed(std::io::Error::other("it panicked")))
    })
}

/// What `core_affinity` lists. On Linux it leaves isolated cores out, hence the other sources above.
fn listed_cores() -> Vec<usize> {
    core_affinity::get_core_ids()
        .unwrap_or_default()
        .into_iter()
        .map(|core| core.id)
        .collect()
}

/// Parses the kernel's list format, `0-3,8,10-11` (Documentation/admin-guide/cputopology.rst): each
/// number once, in ascending order. A part that is not of this format, or names what is not a
/// core's number, is left out.
pub(super) fn parse_core_list(list: &str) -> Vec<usize> {
    let mut listed = vec![false; MOST_CORES];
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>())
            && let Some(range) = listed.get_mut(first..=last)
        {
            range.fill(true);
        }
    }
    (0..MOST_CORES).filter(|core| listed[*core]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists_are_parsed() {
        assert_eq!(parse_core_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_core_list("0\n"), [0]);
        assert_eq!(parse_core_list("\n"), [0usize; 0]);
    }

    #[test]
    fn a_pinned_thread_reads_its_core_back() {
        std::thread::spawn(|| {
            for core in usable_cores() {
                pin_current_thread(core).unwrap();
                if cfg!(target_os = "linux") {
                    assert_eq!(current_affinity(), [core]);
                }
            }
        })
        .join()
        .unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_main_thread_that_pins_itself_takes_no_cores_away() {
        let before = usable_cores();
        let main = libc::pid_t::try_from(std::process::id()).unwrap();
        let restrict = |cores: &[usize]| {
            // SAFETY: as in `confine_current_thread`.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                for core in cores {
                    libc::CPU_SET(*core, &mut set);
                }
                assert_eq!(
                    libc::sched_setaffinity(main, size_of_val(&set), &raw const set),
                    0
                );
            }
        };
        let of_main = affinity_of(main);
        restrict(&before[..1]);
        let after = std::thread::spawn(|| {
            pin_current_thread(usable_cores()[0]).unwrap();
            usable_cores()
        })
        .join();
        restrict(&of_main);
        assert_eq!(after.unwrap(), before);
        assert_eq!(inherited::cores(), before);
    }

    #[test]
    fn a_core_that_does_not_exist_is_an_error() {
        for core in [4096, usize::MAX] {
            let error = pin_current_thread(core).unwrap_err();
            assert!(matches!(error, Error::CoreNotFound { core: found, .. } if found == core));
        }
    }
}
