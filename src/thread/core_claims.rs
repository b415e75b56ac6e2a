//! How the processes of a machine tell each other on which cores their kernels spin, so that each
//! chooses other ones.
//!
//! A claim is a socket with a name that stands for a core (Linux's abstract names, unix(7)): it
//! needs no file and no rights, and goes with its process, however that ends. The child of a fork
//! closes what it inherited. It is advice: processes in other network namespaces do not see it, and
//! where there are no such sockets nothing is claimed.

#[cfg(target_os = "linux")]
pub(super) use system::{ClaimReader, CoreClaim};

#[cfg(target_os = "linux")]
mod system {
    use std::io::ErrorKind;
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::sync::Arc;

    use crate::process::{self, InChild};

    /// Processes that can claim a core at the same time; further ones go uncounted.
    const PLACES: usize = 8;

    /// Only its `Drop` is used.
    #[derive(Debug)]
    pub(crate) struct CoreClaim {
        _socket: Arc<ClaimSocket>,
    }

    #[derive(Debug)]
    struct ClaimSocket(UnixDatagram);

    impl InChild for ClaimSocket {
        /// With a copy of the socket, the child would hold the name for as long as it lives.
        fn close_in_child(&self) {
            // SAFETY: the object exists, so its socket is open. In the child no code uses it: the
            // leases that lead to it are the parent's, and the registry keeps the object from being
            // dropped. The call is async-signal-safe.
            unsafe { libc::close(self.0.as_raw_fd()) };
        }
    }

    fn name(core: usize, place: usize) -> Option<SocketAddr> {
        SocketAddr::from_abstract_name(format!("ringkernel-core-{core}-{place}")).ok()
    }

    impl CoreClaim {
        /// Claims a core, and tells by how many other claims that is preceded at least. `None`
        /// where that is not possible.
        pub(crate) fn new(core: usize) -> Option<(Self, usize)> {
            for place in 0..PLACES {
                match UnixDatagram::bind_addr(&name(core, place)?) {
                    Ok(socket) => {
                        let socket = Arc::new(ClaimSocket(socket));
                        process::register(&socket);
                        return Some((Self { _socket: socket }, place));
                    }
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                    Err(_) => return None,
                }
            }
            None
        }
    }

    /// Looks at claims without making any.
    #[derive(Debug)]
    pub(crate) struct ClaimReader {
        /// `None` where there are no such sockets.
        socket: Option<UnixDatagram>,
    }

    impl ClaimReader {
        pub(crate) fn new() -> Self {
            Self {
                socket: UnixDatagram::unbound().ok(),
            }
        }

        /// How many processes claim the core.
        pub(crate) fn claims(&self, core: usize) -> usize {
            let Some(socket) = &self.socket else {
                return 0;
            };
            (0..PLACES)
                .filter_map(|place| name(core, place))
                // It connects to what is there, and to nothing else.
                .filter(|name| socket.connect_addr(name).is_ok())
                .count()
        }
    }
}

/// There is none.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(super) enum CoreClaim {}

#[cfg(not(target_os = "linux"))]
impl CoreClaim {
    pub(super) fn new(_core: usize) -> Option<(Self, usize)> {
        None
    }
}

#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(super) struct ClaimReader;

#[cfg(not(target_os = "linux"))]
impl ClaimReader {
    pub(super) fn new() -> Self {
        Self
    }

    pub(super) fn claims(&self, _core: usize) -> usize {
        0
    }
}

/// Tests that count claims run one at a time: the child of a fork has all claims until its handler
/// has run.
#[cfg(all(test, target_os = "linux"))]
pub(super) fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn claims_are_counted_while_they_last() {
        let _one = one_at_a_time();
        // No machine has this core, and no other process of these tests this id.
        let core = 1_000_000 + std::process::id() as usize;
        let claim_reader = ClaimReader::new();
        assert_eq!(claim_reader.claims(core), 0);
        let Some((first, 0)) = CoreClaim::new(core) else {
            // A sandbox without such sockets.
            return;
        };
        let (second, before) = CoreClaim::new(core).unwrap();
        assert_eq!((before, claim_reader.claims(core)), (1, 2));
        drop(first);
        assert_eq!(claim_reader.claims(core), 1);
        // The place that is free again is taken first.
        let (third, before) = CoreClaim::new(core).unwrap();
        assert_eq!((before, claim_reader.claims(core)), (0, 2));
        drop((second, third));
        assert_eq!(claim_reader.claims(core), 0);
    }

    #[test]
    fn the_child_of_a_fork_holds_no_claim_of_its_parent() {
        let _one = one_at_a_time();
        let core = 3_000_000 + std::process::id() as usize;
        let Some((claim, _)) = CoreClaim::new(core) else {
            return;
        };
        // SAFETY: the child makes one system call after the other, and nothing else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: no preconditions.
                unsafe { libc::pause() };
            }
        }
        let claim_reader = ClaimReader::new();
        let still_claimed = claim_reader.claims(core);
        drop(claim);
        let begin = std::time::Instant::now();
        let mut is_free = false;
        // The child's handler may not have run yet.
        while !is_free && begin.elapsed().as_secs() < 30 {
            is_free = claim_reader.claims(core) == 0;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // SAFETY: the child is this process's own, and has not been waited for.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(child > 0);
        assert_eq!(still_claimed, 1, "the parent keeps its claim");
        assert!(is_free);
    }

    #[test]
    fn claims_beyond_the_last_place_are_refused() {
        let _one = one_at_a_time();
        let core = 2_000_000 + std::process::id() as usize;
        let claims: Vec<_> = std::iter::from_fn(|| CoreClaim::new(core))
            .take(100)
            .collect();
        assert!(claims.len() < 100);
        assert_eq!(ClaimReader::new().claims(core), claims.len());
    }
}
