//! Who spins where: permits to spin, and the cores that resident kernels hold. One account for the whole process,
//! because its runtimes share the cores.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::budget;
use crate::process::PerProcess;

/// Threads that spin without end, or are about to. The child of a fork has none.
static SPINNERS: PerProcess<AtomicUsize> = PerProcess::new(|| AtomicUsize::new(0));

/// How many resident threads each core carries. As for spinners.
static LEASES: PerProcess<Mutex<BTreeMap<usize, usize>>> =
    PerProcess::new(|| Mutex::new(BTreeMap::new()));

/// Permission for some threads to spin; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct SpinPermit {
    threads: usize,
}

impl SpinPermit {
    /// For `threads` more threads, if each spinner has a core then and `spared` cores are left for threads that do not spin.
    pub(crate) fn sparing(spared: usize, threads: usize) -> Option<Self> {
        let limit = budget::spinners().saturating_sub(spared);
        SPINNERS
            .get()
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |spinners| {
                let after = spinners + threads;
                (after <= limit).then_some(after)
            })
            .ok()
            .map(|_| Self { threads })
    }

    /// For the `threads` blocks of a kernel: granted if each gets a core and one is left for callers.
    pub(crate) fn for_kernel(threads: usize) -> Option<Self> {
        Self::sparing(1, threads)
    }

    /// As [`for_kernel`](Self::for_kernel) for one block, for a thread that could not spin for a while: cores may have come or gone.
    pub(crate) fn for_block_again() -> Option<Self> {
        budget::refresh_if_old();
        Self::for_kernel(1)
    }

    /// For threads that spin whether there are cores or not.
    pub(crate) fn forced(threads: usize) -> Self {
        SPINNERS.get().fetch_add(threads, Ordering::Relaxed);
        Self { threads }
    }

    /// One for each thread.
    pub(crate) fn split(self) -> Vec<Self> {
        let threads = self.threads;
        std::mem::forget(self);
        (0..threads).map(|_| Self { threads: 1 }).collect()
    }
}

impl Drop for SpinPermit {
    fn drop(&mut self) {
        SPINNERS.get().fetch_sub(self.threads, Ordering::Relaxed);
    }
}

/// A core that a resident thread was given; given back when dropped.
#[derive(Debug)]
pub(crate) struct CoreLease {
    core: usize,
}

impl CoreLease {
    /// The least used of `candidates`, of equals the highest: low cores are where an operating system puts interrupts
    /// and main threads. `None` only without candidates.
    pub(crate) fn least_used(candidates: &[usize]) -> Option<Self> {
        let mut leases = LEASES.get().lock();
        let core = candidates
            .iter()
            .copied()
            .min_by_key(|core| (leases.get(core).copied().unwrap_or(0), usize::MAX - core))?;
        *leases.entry(core).or_insert(0) += 1;
        Some(Self { core })
    }

    /// This core, whoever else has it.
    pub(crate) fn of(core: usize) -> Self {
        *LEASES.get().lock().entry(core).or_insert(0) += 1;
        Self { core }
    }

    /// How many different ones of `candidates` no resident thread spins on.
    pub(crate) fn unused(candidates: &[usize]) -> usize {
        let leases = LEASES.get().lock();
        let mut cores = candidates.to_vec();
        cores.sort_unstable();
        cores.dedup();
        cores.retain(|core| !leases.contains_key(core));
        cores.len()
    }

    /// Those of `candidates` that no resident thread spins on; all of them if none is free.
    pub(crate) fn free_of(candidates: &[usize]) -> Vec<usize> {
        let leases = LEASES.get().lock();
        let free: Vec<usize> = candidates
            .iter()
            .copied()
            .filter(|core| !leases.contains_key(core))
            .collect();
        if free.is_empty() {
            candidates.to_vec()
        } else {
            free
        }
    }

    pub(crate) fn core(&self) -> usize {
        self.core
    }
}

impl Drop for CoreLease {
    fn drop(&mut self) {
        let mut leases = LEASES.get().lock();
        if let Some(count) = leases.get_mut(&self.core) {
            *count -= 1;
            if *count == 0 {
                leases.remove(&self.core);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Core numbers far beyond any machine, so that parallel tests of this process do not share them.
    const CORES: [usize; 3] = [900_001, 900_002, 900_003];

    #[test]
    fn leases_spread_over_the_cores_and_are_given_back() {
        let first = CoreLease::least_used(&CORES).unwrap();
        let second = CoreLease::least_used(&CORES).unwrap();
        assert_eq!((first.core(), second.core()), (CORES[2], CORES[1]));
        assert_eq!(CoreLease::free_of(&CORES), [CORES[0]]);
        assert_eq!(CoreLease::unused(&CORES), 1);
        assert_eq!(CoreLease::unused(&[CORES[0], CORES[0]]), 1);
        drop(first);
        assert_eq!(CoreLease::free_of(&CORES), [CORES[0], CORES[2]]);
        let again = CoreLease::of(CORES[0]);
        assert_eq!(CoreLease::least_used(&CORES).unwrap().core(), CORES[2]);
        drop((second, again));
        assert_eq!(CoreLease::free_of(&CORES), CORES);
        assert!(CoreLease::least_used(&[]).is_none());
    }
}
