//! Who spins where: permits to spin, and the cores that resident kernels hold. One account for the whole process,
//! because its runtimes share the cores; other processes are told of the cores (`core_claims.rs`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::budget;
use super::core_claims::{ClaimReader, CoreClaim};
use crate::process::PerProcess;

/// Threads that spin without end, or are about to. The child of a fork has none.
static SPINNERS: PerProcess<AtomicUsize> = PerProcess::new(|| AtomicUsize::new(0));

/// The resident threads that each core carries. As for spinners.
static LEASES: PerProcess<Mutex<BTreeMap<usize, Tenants>>> =
    PerProcess::new(|| Mutex::new(BTreeMap::new()));

/// How often a core is chosen anew because another process took it at the same moment.
const MOST_CHOICES: usize = 8;

/// The resident threads of this process on one core.
#[derive(Debug)]
struct Tenants {
    threads: usize,
    /// What tells other processes of them, where that is possible.
    claim: Option<CoreClaim>,
}

/// Permission for some threads to spin; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct SpinPermit {
    threads: usize,
}

impl SpinPermit {
    /// For `threads` more threads, if each spinner has a core then and `spared` cores are left for
    /// threads that do not spin.
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

    /// As [`for_kernel`](Self::for_kernel) for one block, for a thread that could not spin for a
    /// while: cores may have come or gone.
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
    /// The least used of `candidates`, by this process first, then by others; of equals the
    /// highest: low cores are where an operating system puts interrupts and main threads. `None`
    /// only without candidates.
    pub(crate) fn least_used(candidates: &[usize]) -> Option<Self> {
        let claim_reader = ClaimReader::new();
        let mut leases = LEASES.get().lock();
        for choice in 1.. {
            let (own, others, _, core) = candidates
                .iter()
                .map(|&core| {
                    let (own, others) = usage(&leases, &claim_reader, core);
                    (own, others, usize::MAX - core, core)
                })
                .min()?;
            if own > 0 {
                return Some(Self::add(&mut leases, core, None));
            }
            match CoreClaim::new(core) {
                // Another process came between the look and the claim.
                Some((_, before)) if before > others && choice < MOST_CHOICES => {}
                claim => {
                    let claim = claim.map(|(claim, _)| claim);
                    return Some(Self::add(&mut leases, core, claim));
                }
            }
        }
        None
    }

    /// This core, whichever thread else has it.
    pub(crate) fn of(core: usize) -> Self {
        let mut leases = LEASES.get().lock();
        let claim = match leases.contains_key(&core) {
            true => None,
            false => CoreClaim::new(core).map(|(claim, _)| claim),
        };
        Self::add(&mut leases, core, claim)
    }

    fn add(leases: &mut BTreeMap<usize, Tenants>, core: usize, claim: Option<CoreClaim>) -> Self {
        let tenants = leases.entry(core).or_insert(Tenants {
            threads: 0,
            claim: None,
        });
        tenants.threads += 1;
        tenants.claim = tenants.claim.take().or(claim);
        Self { core }
    }

    /// How many different ones of `candidates` no resident thread has, of this process or of
    /// another one.
    pub(crate) fn unused(candidates: &[usize]) -> usize {
        let claim_reader = ClaimReader::new();
        let leases = LEASES.get().lock();
        let mut cores = candidates.to_vec();
        cores.sort_unstable();
        cores.dedup();
        cores.retain(|&core| usage(&leases, &claim_reader, core) == (0, 0));
        cores.len()
    }

    /// Those of `candidates` that no resident thread of this process has; all of them if none is
    /// free.
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

/// Resident threads of this process on a core, and other processes that have some there.
fn usage(
    leases: &BTreeMap<usize, Tenants>,
    claim_reader: &ClaimReader,
    core: usize,
) -> (usize, usize) {
    let own = leases.get(&core);
    let own_claims = usize::from(own.is_some_and(|tenants| tenants.claim.is_some()));
    (
        own.map_or(0, |tenants| tenants.threads),
        claim_reader.claims(core).saturating_sub(own_claims),
    )
}

impl Drop for CoreLease {
    fn drop(&mut self) {
        let mut leases = LEASES.get().lock();
        if let Some(tenants) = leases.get_mut(&self.core) {
            tenants.threads -= 1;
            if tenants.threads == 0 {
                leases.remove(&self.core);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Core numbers far beyond any machine, so that parallel tests, of this process and of others,
    /// do not share them.
    fn cores(from: usize) -> [usize; 3] {
        let first = from + 10 * std::process::id() as usize;
        [first, first + 1, first + 2]
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_core_that_another_process_has_is_chosen_last() {
        let _one = crate::thread::core_claims::one_at_a_time();
        let cores = cores(200_000_000);
        // What another process does, seen from here.
        let Some((other, _)) = CoreClaim::new(cores[2]) else {
            return;
        };
        assert_eq!(CoreLease::unused(&cores), 2);
        let first = CoreLease::least_used(&cores).unwrap();
        let second = CoreLease::least_used(&cores).unwrap();
        let third = CoreLease::least_used(&cores).unwrap();
        assert_eq!(
            [first.core(), second.core(), third.core()],
            [cores[1], cores[0], cores[2]]
        );
        assert_eq!(ClaimReader::new().claims(cores[2]), 2);
        drop(third);
        assert_eq!(ClaimReader::new().claims(cores[2]), 1);
        assert_eq!(CoreLease::unused(&cores), 0);
        drop(other);
        assert_eq!(CoreLease::unused(&cores), 1);
        drop((first, second));
        assert!(
            cores
                .iter()
                .all(|core| ClaimReader::new().claims(*core) == 0)
        );
    }

    #[test]
    fn leases_spread_over_the_cores_and_are_given_back() {
        #[cfg(target_os = "linux")]
        let _one = crate::thread::core_claims::one_at_a_time();
        let cores = cores(100_000_000);
        let first = CoreLease::least_used(&cores).unwrap();
        let second = CoreLease::least_used(&cores).unwrap();
        assert_eq!((first.core(), second.core()), (cores[2], cores[1]));
        assert_eq!(CoreLease::free_of(&cores), [cores[0]]);
        assert_eq!(CoreLease::unused(&cores), 1);
        assert_eq!(CoreLease::unused(&[cores[0], cores[0]]), 1);
        drop(first);
        assert_eq!(CoreLease::free_of(&cores), [cores[0], cores[2]]);
        let again = CoreLease::of(cores[0]);
        assert_eq!(CoreLease::least_used(&cores).unwrap().core(), cores[2]);
        drop((second, again));
        assert_eq!(CoreLease::free_of(&cores), cores);
        assert!(CoreLease::least_used(&[]).is_none());
    }
}
