//! How the processes of a machine tell each other on which cores their kernels spin, so that each chooses other ones.
//!
//! A claim is a socket with a name that stands for a core (Linux's abstract names, unix(7)): it needs no file and no
//! rights, and goes with its process, however that ends. It is advice. Processes in other network namespaces do not see
//! it, and where there are no such sockets nothing is claimed.

#[cfg(target_os = "linux")]
pub(super) use system::{CoreClaim, Onlooker};

#[cfg(target_os = "linux")]
mod system {
    use std::io::ErrorKind;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    /// Processes that can claim a core at the same time; further ones go uncounted.
    const PLACES: usize = 8;

    /// Only its `Drop` is used.
    #[derive(Debug)]
    pub(crate) struct CoreClaim {
        _socket: UnixDatagram,
    }

    fn name(core: usize, place: usize) -> Option<SocketAddr> {
        SocketAddr::from_abstract_name(format!("ringkernel-core-{core}-{place}")).ok()
    }

    impl CoreClaim {
        /// Claims a core, and tells by how many other claims that is preceded at least. `None` where that is not possible.
        pub(crate) fn new(core: usize) -> Option<(Self, usize)> {
            for place in 0..PLACES {
                match UnixDatagram::bind_addr(&name(core, place)?) {
                    Ok(_socket) => return Some((Self { _socket }, place)),
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                    Err(_) => return None,
                }
            }
            None
        }
    }

    /// Looks at claims without making any.
    #[derive(Debug)]
    pub(crate) struct Onlooker {
        /// `None` where there are no such sockets.
        socket: Option<UnixDatagram>,
    }

    impl Onlooker {
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
pub(super) struct Onlooker;

#[cfg(not(target_os = "linux"))]
impl Onlooker {
    pub(super) fn new() -> Self {
        Self
    }

    pub(super) fn claims(&self, _core: usize) -> usize {
        0
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn claims_are_counted_while_they_last() {
        // No machine has this core, and no other process of these tests this id.
        let core = 1_000_000 + std::process::id() as usize;
        let onlooker = Onlooker::new();
        assert_eq!(onlooker.claims(core), 0);
        let Some((first, 0)) = CoreClaim::new(core) else {
            // A sandbox without such sockets.
            return;
        };
        let (second, before) = CoreClaim::new(core).unwrap();
        assert_eq!((before, onlooker.claims(core)), (1, 2));
        drop(first);
        assert_eq!(onlooker.claims(core), 1);
        // The place that is free again is taken first.
        let (third, before) = CoreClaim::new(core).unwrap();
        assert_eq!((before, onlooker.claims(core)), (0, 2));
        drop((second, third));
        assert_eq!(onlooker.claims(core), 0);
    }

    #[test]
    fn claims_beyond_the_last_place_are_refused() {
        let core = 2_000_000 + std::process::id() as usize;
        let claims: Vec<_> = std::iter::from_fn(|| CoreClaim::new(core))
            .take(100)
            .collect();
        assert!(claims.len() < 100);
        assert_eq!(Onlooker::new().claims(core), claims.len());
    }
}
