//! The states of a kernel, which lead to which, and how one fails.

use std::fmt;

use crate::message::{Extension, MessageHeader};

/// Where a kernel is in its life.
///
/// ```text
/// Created -> Launched -> Active <-> Deactivated
///                 \         |         /
///                  \        v        /
///                   +-> Terminating -> Terminated        any of these but the last -> Failed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KernelState {
    /// Its memory is there, its code does not run yet.
    Created = 0,
    /// Resident, not polling.
    Launched = 1,
    /// Resident and polling.
    Active = 2,
    /// Resident, not polling; state and queued messages are kept.
    Deactivated = 3,
    /// Asked to end.
    Terminating = 4,
    /// Ended on request.
    Terminated = 5,
    /// Ended by a panic, a fault, a corrupt ring, or a handler that never returned.
    Failed = 6,
}

impl KernelState {
    /// All states.
    pub const ALL: [Self; 7] = [
        Self::Created,
        Self::Launched,
        Self::Active,
        Self::Deactivated,
        Self::Terminating,
        Self::Terminated,
        Self::Failed,
    ];

    /// The state's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Launched => "Launched",
            Self::Active => "Active",
            Self::Deactivated => "Deactivated",
            Self::Terminating => "Terminating",
            Self::Terminated => "Terminated",
            Self::Failed => "Failed",
        }
    }

    /// Whether a kernel in this state may go to `next`.
    #[must_use]
    pub const fn can_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Created, Self::Launched)
                | (
                    Self::Launched | Self::Deactivated,
                    Self::Active | Self::Terminating
                )
                | (Self::Active, Self::Deactivated | Self::Terminating)
                | (Self::Terminating, Self::Terminated)
                | (
                    Self::Created
                        | Self::Launched
                        | Self::Active
                        | Self::Deactivated
                        | Self::Terminating,
                    Self::Failed
                )
        )
    }

    /// Whether the kernel will never process another message.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed)
    }

    pub(crate) const fn from_bits(bits: u32) -> Self {
        match bits {
            0 => Self::Created,
            1 => Self::Launched,
            2 => Self::Active,
            3 => Self::Deactivated,
            4 => Self::Terminating,
            5 => Self::Terminated,
            _ => Self::Failed,
        }
    }
}

impl fmt::Display for KernelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A message that was accepted but reached no handler, or killed the one that it reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndeliveredMessage {
    /// Name of the kernel it was for.
    pub kernel: String,
    /// Block of the kernel's grid.
    pub block: u32,
    /// Its header.
    pub header: MessageHeader,
    /// Its timestamp, deadline and trace id, if it carried them.
    pub extension: Option<Extension>,
    /// Its payload; empty if there was no memory for a copy.
    pub payload: Vec<u8>,
}

/// How a kernel failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFailure {
    /// What kind of failure.
    pub reason: FailureReason,
    /// What the handler, the driver or the runtime said.
    pub message: String,
    /// The block that failed; `None` if it is the kernel or its device as a whole.
    pub block: Option<u32>,
    /// The request that was being handled, if the failure lies in handling one.
    pub request: Option<UndeliveredMessage>,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureReason {
    /// A handler panicked.
    Panic,
    /// A handler did not return within the termination timeout.
    Stuck,
    /// One side of a ring wrote what no correct program writes.
    CorruptRing,
    /// The device code faulted.
    Fault,
    /// The device is gone.
    DeviceLost,
    /// The process is the child of a `fork`: the kernel goes on in the parent.
    Forked,
}

impl fmt::Display for KernelFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            FailureReason::Panic => "panic",
            FailureReason::Stuck => "stuck",
            FailureReason::CorruptRing => "corrupt ring",
            FailureReason::Fault => "fault",
            FailureReason::DeviceLost => "device lost",
            FailureReason::Forked => "forked",
        };
        write!(f, "{reason}")?;
        if let Some(block) = self.block {
            write!(f, " in block {block}")?;
        }
        write!(f, ": {}", self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legal_transitions_are_exactly_these() {
        use KernelState::*;
        let legal = [
            (Created, Launched),
            (Created, Failed),
            (Launched, Active),
            (Launched, Terminating),
            (Launched, Failed),
            (Active, Deactivated),
            (Active, Terminating),
            (Active, Failed),
            (Deactivated, Active),
            (Deactivated, Terminating),
            (Deactivated, Failed),
            (Terminating, Terminated),
            (Terminating, Failed),
        ];
        for from in KernelState::ALL {
            for to in KernelState::ALL {
                assert_eq!(
                    from.can_become(to),
                    legal.contains(&(from, to)),
                    "{from} -> {to}"
                );
            }
            assert_eq!(KernelState::from_bits(from as u32), from);
        }
    }
}
