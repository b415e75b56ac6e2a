//! Two connected kernels, in the hands of whoever connected them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::instance::KernelInstance;
use super::pipeline::{ConnectionKind, Way, check_states, lock_both, recall};
use crate::error::Error;
use crate::time::Deadline;

/// Two connected kernels. Dropping it leaves them connected.
#[derive(Clone)]
pub struct Connection {
    names: [String; 2],
    way: Way,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("from", &self.names[0])
            .field("to", &self.names[1])
            .finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) fn new(from: &KernelInstance, to: &KernelInstance, way: Way) -> Self {
        Self {
            names: [from, to].map(|kernel| kernel.signals.name.clone()),
            way,
        }
    }

    /// What it is made of now: a ring gives way to the bridge when another kernel joins in.
    fn way(&self) -> Way {
        match &self.way {
            Way::Ring(joint) => match &*joint.moved.lock() {
                Some(edge) => Way::Bridge(Arc::clone(edge)),
                None => Way::Ring(Arc::clone(joint)),
            },
            Way::Bridge(edge) => Way::Bridge(Arc::clone(edge)),
        }
    }

    /// How it works at the moment.
    #[must_use]
    pub fn kind(&self) -> ConnectionKind {
        match self.way() {
            Way::Ring(joint) => joint.kind,
            Way::Bridge(_) => ConnectionKind::Bridged,
        }
    }

    /// Name of the kernel whose replies go this way.
    #[must_use]
    pub fn from(&self) -> &str {
        &self.names[0]
    }

    /// Name of the kernel that takes them.
    #[must_use]
    pub fn to(&self) -> &str {
        &self.names[1]
    }

    /// Whether the kernels are still connected: neither has ended, and nobody has disconnected them.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match self.way() {
            Way::Ring(joint) => joint.is_live(),
            Way::Bridge(edge) => edge.is_live(),
        }
    }

    /// Messages that have gone this way and that the second kernel has taken; over the bridge, that lie in its ring.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        let by_ring = match &self.way {
            Way::Ring(joint) => joint.passage.delivered(),
            Way::Bridge(_) => 0,
        };
        match self.way() {
            Way::Ring(_) => by_ring,
            Way::Bridge(edge) => by_ring + edge.carried.load(Ordering::Relaxed),
        }
    }

    /// Undoes it: replies of the first kernel wait for its callers again (or go to the other kernels that it feeds alone), and the second one
    /// can be sent to (unless others feed it still). What has been passed on stays in the second kernel's ring. Does nothing if they are not
    /// connected any more. Blocks for a moment, until the first kernel has brought the ring back.
    ///
    /// # Errors
    /// [`Error::InvalidTransition`] if one of the kernels is active; [`Error::Timeout`];
    /// [`Error::CalledFromHandler`] in a handler of one of them. They stay connected then.
    pub fn disconnect(&self) -> Result<(), Error> {
        match self.way() {
            Way::Ring(joint) => {
                let (Some(from), Some(to)) = (joint.from.upgrade(), joint.to.upgrade()) else {
                    return Ok(());
                };
                for kernel in [&from, &to] {
                    kernel.check_not_here("disconnection")?;
                }
                let _controls = lock_both(&from, &to);
                if joint.is_live() {
                    check_states(&from, &to, "Disconnected")?;
                    recall(&from)?;
                }
                joint.undo();
                Ok(())
            }
            Way::Bridge(edge) => {
                let relay = edge.relay.upgrade();
                let (Some(relay), Some(to)) = (relay, edge.to.upgrade()) else {
                    return Ok(());
                };
                let Some(from) = relay.from() else {
                    return Ok(());
                };
                for kernel in [&from, &to] {
                    kernel.check_not_here("disconnection")?;
                }
                let _controls = lock_both(&from, &to);
                if edge.is_live() {
                    check_states(&from, &to, "Disconnected")?;
                }
                let deadline = Deadline::after(from.termination_timeout);
                if relay.remove(&edge, deadline) {
                    return Ok(());
                }
                Err(Error::Timeout {
                    operation: "disconnection",
                    kernel: from.signals.name.clone(),
                    after: from.termination_timeout,
                })
            }
        }
    }
}
