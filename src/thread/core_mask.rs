//! Sets of cores as the system takes them, of any size: `cpu_set_t` has 1 024 bits, and Linux
//! refuses a smaller set than the machine could have cores.

use std::io;

/// Core numbers are below this: eight times what any Linux distribution is built for
/// (`CONFIG_NR_CPUS`). Larger ones are not of a core.
pub(super) const MOST_CORES: usize = 1 << 16;

const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// Words of a `cpu_set_t`, with which the system is asked first.
const FIRST_WORDS: usize = size_of::<libc::cpu_set_t>() / size_of::<libc::c_ulong>();

/// A bit a core, as many words as it takes.
#[derive(Clone, Debug)]
pub(super) struct CoreMask(Vec<libc::c_ulong>);

impl CoreMask {
    /// The set of these cores; `None` if one is not a core's number.
    pub(super) fn of(cores: &[usize]) -> Option<Self> {
        let words = cores
            .iter()
            .max()
            .map_or(0, |most| most / WORD_BITS + 1)
            .max(FIRST_WORDS);
        if words > MOST_CORES / WORD_BITS {
            return None;
        }
        let mut mask = vec![0; words];
        for core in cores {
            if let Some(word) = mask.get_mut(core / WORD_BITS) {
                *word |= 1 << (core % WORD_BITS);
            }
        }
        Some(Self(mask))
    }

    /// The cores that a thread may run on; 0 names the calling thread.
    pub(super) fn of_thread(thread: libc::pid_t) -> io::Result<Self> {
        let mut words = FIRST_WORDS;
        loop {
            let mut mask = vec![0; words];
            match get(thread, &mut mask) {
                Ok(()) => return Ok(Self(mask)),
                // There could be more cores than bits.
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL)
                        && words < MOST_CORES / WORD_BITS =>
                {
                    words *= 2;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Lets the calling thread run on these cores, as far as its cpuset has them, and on no other.
    pub(super) fn apply(&self) -> io::Result<()> {
        let bytes = size_of_val(self.0.as_slice());
        // SAFETY: the pointer and the size describe the words, which the call reads; 0 names the
        // calling thread.
        match unsafe { libc::sched_setaffinity(0, bytes, self.0.as_ptr().cast()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The cores, in ascending order.
    pub(super) fn cores(&self) -> Vec<usize> {
        cores_of(self.0.iter().copied())
    }
}

fn get(thread: libc::pid_t, words: &mut [libc::c_ulong]) -> io::Result<()> {
    let bytes = size_of_val(words);
    // SAFETY: the pointer and the size describe the words, which the call overwrites: any bits are
    // an integer.
    match unsafe { libc::sched_getaffinity(thread, bytes, words.as_mut_ptr().cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn cores_of(words: impl Iterator<Item = libc::c_ulong>) -> Vec<usize> {
    words
        .enumerate()
        .flat_map(|(index, word)| {
            (0..WORD_BITS)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| index * WORD_BITS + bit)
        })
        .collect()
}

/// What the process was allowed when it was started.
pub(super) mod inherited {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{MOST_CORES, WORD_BITS, cores_of, get};

    const WORDS: usize = MOST_CORES / WORD_BITS;

    /// A bit a core; empty where nothing has run before `main`.
    static CORES: [AtomicUsize; WORDS] = [const { AtomicUsize::new(0) }; WORDS];

    /// Run before `main`, or when a library that holds this crate is loaded: afterwards threads may
    /// pin themselves.
    #[used]
    // SAFETY: the section holds pointers to functions of this type (System V ABI, "Initialization
    // and Termination Functions"); this one only makes a system call and stores to atomics.
    #[unsafe(link_section = ".init_array")]
    static BEFORE_MAIN: extern "C" fn() = remember;

    extern "C" fn remember() {
        // On the stack: nothing is allocated before `main`.
        let mut words = [0; WORDS];
        if get(0, &mut words).is_ok() {
            for (to, from) in CORES.iter().zip(words) {
                to.store(from as usize, Ordering::Relaxed);
            }
        }
    }

    pub(in crate::thread) fn cores() -> Vec<usize> {
        cores_of(
            CORES
                .iter()
                .map(|word| word.load(Ordering::Relaxed) as libc::c_ulong),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_hold_cores_beyond_the_first_thousand() {
        for cores in [
            vec![],
            vec![0],
            vec![3, 63, 64, 1023],
            vec![0, 1024, 2047, MOST_CORES - 1],
        ] {
            assert_eq!(CoreMask::of(&cores).unwrap().cores(), cores);
        }
        for core in [MOST_CORES, usize::MAX] {
            assert!(CoreMask::of(&[0, core]).is_none());
        }
    }
}
