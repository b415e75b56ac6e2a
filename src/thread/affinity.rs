//! Which cores there are, and putting a thread on one of them.

use crate::error::Error;
use crate::logging;

/// The cores that are online, by number, isolated ones included.
///
/// May read `/sys`; for the control plane only.
#[must_use]
pub fn online_cores() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    if let Ok(list) = std::fs::read_to_string("/sys/devices/system/cpu/online") {
        let cores = parse_core_list(&list);
        if !cores.is_empty() {
            return cores;
        }
    }
    listed_cores()
}

/// The cores that kernels are put on when nobody names any: those that the calling thread or the process's main thread
/// may run on, or could run on before `main` began (on Linux). A thread that pinned itself before it built the runtime, be
/// it the main thread, therefore does not drag its kernels along.
#[must_use]
pub fn usable_cores() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // The main thread's id is the process id.
        let main = libc::pid_t::try_from(std::process::id()).unwrap_or(0);
        let mut cores = affinity_of(0);
        cores.extend(affinity_of(main));
        cores.extend(inherited::cores());
        cores.sort_unstable();
        cores.dedup();
        if !cores.is_empty() {
            return cores;
        }
    }
    listed_cores()
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

/// What the process was allowed when it was started.
#[cfg(target_os = "linux")]
mod inherited {
    use std::sync::atomic::{AtomicU64, Ordering};

    const WORDS: usize = size_of::<libc::cpu_set_t>() / 8;

    /// A bit a core; empty where nothing has run before `main`.
    static CORES: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];

    /// Run before `main`, or when a library that holds this crate is loaded: afterwards threads may pin themselves.
    #[used]
    // SAFETY: the section holds pointers to functions of this type (System V ABI, "Initialization and Termination
    // Functions"); this one only makes a system call and stores to atomics.
    #[unsafe(link_section = ".init_array")]
    static BEFORE_MAIN: extern "C" fn() = remember;

    extern "C" fn remember() {
        let mut words = [0_u64; WORDS];
        // SAFETY: `cpu_set_t` is an array of words, one bit a core, and `words` is as large.
        let got =
            unsafe { libc::sched_getaffinity(0, size_of_val(&words), words.as_mut_ptr().cast()) };
        if got == 0 {
            for (to, from) in CORES.iter().zip(words) {
                to.store(from, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn cores() -> impl Iterator<Item = usize> {
        CORES.iter().enumerate().flat_map(|(index, word)| {
            let word = word.load(Ordering::Relaxed);
            (0..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| index * 64 + bit)
        })
    }
}

/// How many cores [`usable_cores`] gave when it was first asked for; one at least.
pub(crate) fn usable_core_count() -> usize {
    static COUNT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *COUNT.get_or_init(|| usable_cores().len().max(1))
}

/// Looks the usable cores up, so that no wait has to. Control plane only.
pub(crate) fn initialise() {
    let _ = usable_core_count();
}

/// The cores that the calling thread may run on; empty where the system does not tell.
#[must_use]
pub fn current_affinity() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    return affinity_of(0);
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// Fails unless the core exists.
///
/// # Errors
/// [`Error::CoreNotFound`].
pub fn check_core(core: usize) -> Result<(), Error> {
    let available = online_cores();
    if available.contains(&core) {
        Ok(())
    } else {
        Err(Error::CoreNotFound { core, available })
    }
}

/// Puts the calling thread on one core, and reads back that it is there (on Linux; elsewhere the system's word counts).
///
/// # Errors
/// [`Error::CoreNotFound`] if there is no such core, [`Error::PinningFailed`] if the thread ended up elsewhere.
///
/// ```
/// use ringkernel::{Error, thread::affinity};
/// let core = affinity::current_affinity().first().copied().unwrap_or(0);
/// affinity::pin_current_thread(core)?;
/// assert!(matches!(affinity::pin_current_thread(100_000), Err(Error::CoreNotFound { .. })));
/// # Ok::<(), Error>(())
/// ```
pub fn pin_current_thread(core: usize) -> Result<(), Error> {
    check_core(core)?;
    let accepted = core_affinity::set_for_current(core_affinity::CoreId { id: core });
    let found = current_affinity();
    if found == [core] || (found.is_empty() && accepted) {
        return Ok(());
    }
    Err(Error::PinningFailed {
        cores: vec![core],
        reason: format!("its cores are {found:?}"),
    })
}

/// Lets the calling thread run on any of `cores`, and on no other. Does nothing where the system has no such call.
///
/// # Errors
/// [`Error::PinningFailed`] if the thread may not run on every one of them.
pub(crate) fn confine_current_thread(cores: &[usize]) -> Result<(), Error> {
    #[cfg(target_os = "linux")]
    {
        let failed = |reason| Error::PinningFailed {
            cores: cores.to_vec(),
            reason,
        };
        // SAFETY: `cpu_set_t` is an array of integers; all zeros is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for &core in cores {
            if core >= libc::CPU_SETSIZE as usize {
                return Err(failed(format!("core {core} exceeds the system's set")));
            }
            // SAFETY: `core` is below CPU_SETSIZE, the number of bits in the set.
            unsafe { libc::CPU_SET(core, &mut set) };
        }
        // SAFETY: the pointer and the size describe `set`; 0 names the calling thread.
        if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } != 0 {
            return Err(failed(std::io::Error::last_os_error().to_string()));
        }
        let found = current_affinity();
        if found != cores {
            return Err(failed(format!("its cores are {found:?}")));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cores;
    Ok(())
}

/// Runs `body` on a thread of its own, which may run on `cores` only (anywhere, with a warning, if it may not).
///
/// # Errors
/// [`Error::Os`] if there can be no thread, or `body` panics.
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
pub(crate) fn on_cores<T: Send>(
    name: &'static str,
    cores: &[usize],
    body: impl FnOnce() -> T + Send,
) -> Result<T, Error> {
    let failed = |source| Error::Os {
        operation: "run a thread to open a driver",
        source,
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn_scoped(scope, || {
                if !cores.is_empty()
                    && let Err(error) = confine_current_thread(cores)
                {
                    logging::warning!("{name}: driver threads run anywhere: {error}");
                }
                body()
            })
            .map_err(failed)?;
        thread
            .join()
            .map_err(|_| failed(std::io::Error::other("the driver panicked")))
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

#[cfg(target_os = "linux")]
fn affinity_of(thread: libc::pid_t) -> Vec<usize> {
    // SAFETY: `cpu_set_t` is an array of integers; all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and the size describe `set`.
    if unsafe { libc::sched_getaffinity(thread, size_of_val(&set), &raw mut set) } != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE, the number of bits in the set.
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &set) })
        .collect()
}

/// Parses the kernel's list format, `0-3,8,10-11` (Documentation/admin-guide/cputopology.rst).
pub(super) fn parse_core_list(list: &str) -> Vec<usize> {
    let mut cores = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cores.extend(first..=last);
        }
    }
    cores
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
        assert!(inherited::cores().eq(before));
    }

    #[test]
    fn a_core_that_does_not_exist_is_an_error() {
        for core in [4096, usize::MAX] {
            let error = pin_current_thread(core).unwrap_err();
            assert!(matches!(error, Error::CoreNotFound { core: found, .. } if found == core));
        }
    }
}
