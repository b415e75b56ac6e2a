//! The error of everything that is not a message call.

use std::fmt;
use std::io;
use std::time::Duration;

/// What can go wrong outside the message path. Closed on purpose: each variant names what it speaks of.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// No kernel of this id is registered.
    KernelNotFound {
        /// The id asked for.
        id: String,
        /// Every id that is registered, sorted.
        registered: Vec<String>,
    },
    /// Two registrations have the same id.
    DuplicateKernel {
        /// The id.
        id: String,
    },
    /// The kernel cannot go from its state to that one.
    InvalidTransition {
        /// The kernel's name.
        kernel: String,
        /// State it is in.
        from: &'static str,
        /// State asked for.
        to: &'static str,
    },
    /// The runtime cannot do this in its state.
    InvalidLifecycle {
        /// State it is in.
        state: &'static str,
        /// What was asked for.
        operation: &'static str,
    },
    /// The kernel's endpoints cannot be given away now.
    EndpointsBusy {
        /// The kernel's name.
        kernel: String,
        /// Who holds them.
        reason: &'static str,
    },
    /// Replies would come back to the kernel that gave them.
    Cycle {
        /// The kernels on the way, the first of them again at the end.
        kernels: Vec<String>,
    },
    /// The kernel is connected already in this direction.
    ConnectedAlready {
        /// The kernel's name.
        kernel: String,
        /// Name of the kernel before or behind it.
        with: String,
    },
    /// The two kernels cannot be connected.
    CannotConnect {
        /// Name of the kernel whose replies were to become requests.
        from: String,
        /// Name of the kernel that was to take them.
        to: String,
        /// Why.
        reason: &'static str,
    },
    /// The topic is there already, with other messages.
    TopicMismatch {
        /// The topic's name.
        topic: String,
        /// What it has, and what was asked for.
        reason: String,
    },
    /// There are as many publishers, subscribers or topics as there may be.
    TopicFull {
        /// The topic's name.
        topic: String,
        /// What there are too many of.
        what: &'static str,
        /// How many there may be.
        max: usize,
    },
    /// A publisher of the topic stands still in the middle of publishing.
    TopicBusy {
        /// The topic's name.
        topic: String,
        /// For how long it was waited for.
        after: Duration,
    },
    /// The kernel cannot subscribe to the topic.
    CannotSubscribe {
        /// The topic's name.
        topic: String,
        /// The kernel's name.
        kernel: String,
        /// Why.
        reason: &'static str,
    },
    /// An option or configuration value is out of range.
    InvalidOption {
        /// Name of the option.
        option: &'static str,
        /// What is wrong with its value, and what would be right.
        reason: String,
    },
    /// A message type that the kernel was not registered for.
    UnknownType {
        /// The kernel's name.
        kernel: String,
        /// Name of the type.
        type_name: &'static str,
    },
    /// The backend cannot be used on this machine.
    BackendUnavailable {
        /// Name of the backend.
        backend: &'static str,
        /// Why.
        reason: String,
    },
    /// No device of this index.
    DeviceNotFound {
        /// Name of the backend.
        backend: &'static str,
        /// Index asked for.
        index: usize,
        /// How many there are.
        available: usize,
    },
    /// No device whose name contains this, or none that may be chosen.
    DeviceNotNamed {
        /// Name of the backend.
        backend: &'static str,
        /// The name, or part of one, asked for.
        name: String,
        /// The devices there are.
        available: Vec<String>,
    },
    /// A kernel's source does not compile.
    Compile {
        /// Id of the registration.
        kernel: String,
        /// What the compiler said; line numbers are those of the kernel's own source.
        log: String,
    },
    /// A kernel's compiled code is not what the device can run.
    InvalidCode {
        /// Id of the registration.
        kernel: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel's registration has no code for this backend.
    NoHandler {
        /// Id of the registration.
        kernel: String,
        /// Name of the backend.
        backend: &'static str,
    },
    /// The device is gone, and everything on it.
    DeviceLost {
        /// Name of the device.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// The device cannot do this while kernels run on it, or has no place for one more.
    DeviceBusy {
        /// Name of the device.
        device: String,
        /// What it cannot do, and what would help.
        reason: String,
    },
    /// The driver refused a call for a reason of its own.
    DriverFailed {
        /// Name of the device.
        device: String,
        /// What it said.
        reason: String,
    },
    /// Memory that the device, or the limit set for it, does not have.
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Bytes asked for.
        asked: u64,
        /// Bytes still available.
        available: u64,
    },
    /// No such core, or not one that this process may use.
    CoreNotFound {
        /// The core asked for.
        core: usize,
        /// The cores there are.
        available: Vec<usize>,
    },
    /// A thread could not be pinned although the core exists.
    PinningFailed {
        /// The cores asked for.
        cores: Vec<usize>,
        /// What the system says instead.
        reason: String,
    },
    /// Something did not end in time.
    Timeout {
        /// What was waited for.
        operation: &'static str,
        /// The kernel's name.
        kernel: String,
        /// For how long.
        after: Duration,
    },
    /// The kernel did not follow a command in time because the handler of another kernel holds the
    /// thread that they share
    /// ([`ConnectionKind::SharedThread`](crate::ConnectionKind::SharedThread)).
    ThreadHeld {
        /// What was waited for.
        operation: &'static str,
        /// The kernel's name.
        kernel: String,
        /// Name of the kernel whose handler does not return.
        holder: String,
        /// For how long it was waited for.
        after: Duration,
    },
    /// A handler called this for its own kernel, or for one that shares its thread: it would wait
    /// for itself. Nothing has changed.
    CalledFromHandler {
        /// What was called.
        operation: &'static str,
        /// Name of the kernel that would have to follow.
        kernel: String,
    },
    /// A realtime thread was refused a setting that it requires.
    RealtimeRefused {
        /// The thread's name.
        thread: String,
        /// The setting.
        setting: String,
        /// The system's answer, the limit in the way, and how it can be granted.
        reason: String,
        /// Everything that was asked for, and what came of it: a line each.
        report: String,
    },
    /// The process is the child of a `fork`: what was made before stays with its parent. A new
    /// runtime can be built.
    Forked {
        /// What was attempted.
        operation: &'static str,
    },
    /// The operating system refused a call.
    Os {
        /// What was attempted.
        operation: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KernelNotFound { id, registered } => write!(
                f,
                "no kernel '{id}' is registered; registered are: {}",
                registered.join(", ")
            ),
            Self::DuplicateKernel { id } => write!(f, "kernel '{id}' is registered twice"),
            Self::InvalidTransition { kernel, from, to } => {
                write!(f, "kernel '{kernel}' cannot go from {from} to {to}")
            }
            Self::InvalidLifecycle { state, operation } => {
                write!(f, "the runtime is {state} and cannot {operation}")
            }
            Self::EndpointsBusy { kernel, reason } => {
                write!(f, "the endpoints of kernel '{kernel}' are busy: {reason}")
            }
            Self::Cycle { kernels } => {
                write!(f, "kernels would feed themselves: {}", kernels.join(" -> "))
            }
            Self::ConnectedAlready { kernel, with } => {
                write!(
                    f,
                    "kernel '{kernel}' is connected already, with kernel '{with}'"
                )
            }
            Self::CannotConnect { from, to, reason } => write!(
                f,
                "the replies of kernel '{from}' cannot become requests of kernel '{to}': {reason}"
            ),
            Self::TopicMismatch { topic, reason } => {
                write!(f, "topic '{topic}' has other messages: {reason}")
            }
            Self::TopicFull { topic, what, max } => {
                write!(f, "topic '{topic}': there are {max} {what} already")
            }
            Self::TopicBusy { topic, after } => write!(
                f,
                "topic '{topic}': a publisher stood still in the middle of publishing for {after:?}"
            ),
            Self::CannotSubscribe {
                topic,
                kernel,
                reason,
            } => write!(
                f,
                "kernel '{kernel}' cannot subscribe to topic '{topic}': {reason}"
            ),
            Self::InvalidOption { option, reason } => write!(f, "invalid {option}: {reason}"),
            Self::UnknownType { kernel, type_name } => {
                write!(f, "kernel '{kernel}' does not take or give '{type_name}'")
            }
            Self::BackendUnavailable { backend, reason } => {
                write!(f, "backend {backend} is unavailable: {reason}")
            }
            Self::DeviceNotFound {
                backend,
                index,
                available,
            } => write!(
                f,
                "backend {backend} has no device {index}; it has {available}"
            ),
            Self::DeviceNotNamed {
                backend,
                name,
                available,
            } => write!(
                f,
                "backend {backend} has no device named '{name}'; it has: {}",
                available.join(", ")
            ),
            Self::Compile { kernel, log } => {
                write!(f, "kernel '{kernel}' does not compile: {log}")
            }
            Self::InvalidCode { kernel, reason } => {
                write!(f, "the code of kernel '{kernel}' cannot be run: {reason}")
            }
            Self::NoHandler { kernel, backend } => {
                write!(f, "kernel '{kernel}' has no handler for backend {backend}")
            }
            Self::DeviceLost { device, reason } => {
                write!(f, "device '{device}' is lost: {reason}")
            }
            Self::DeviceBusy { device, reason } => write!(f, "device '{device}' is busy: {reason}"),
            Self::DriverFailed { device, reason } => write!(f, "device '{device}': {reason}"),
            Self::OutOfMemory {
                device,
                asked,
                available,
            } => write!(
                f,
                "device '{device}' cannot give {asked} bytes; {available} are available"
            ),
            Self::CoreNotFound { core, available } => {
                write!(f, "there is no core {core}; there are {available:?}")
            }
            Self::PinningFailed { cores, reason } => {
                write!(f, "the thread was not pinned to cores {cores:?}: {reason}")
            }
            Self::Timeout {
                operation,
                kernel,
                after,
            } => write!(
                f,
                "{operation} of kernel '{kernel}' did not end within {after:?}"
            ),
            Self::ThreadHeld {
                operation,
                kernel,
                holder,
                after,
            } => write!(
                f,
                "{operation} of kernel '{kernel}' did not end within {after:?}: the handler of kernel '{holder}' holds \
                 the thread that they share"
            ),
            Self::CalledFromHandler { operation, kernel } => write!(
                f,
                "{operation} of kernel '{kernel}' was asked for by a handler that runs on the kernel's own thread, and would wait \
                 for that handler; ask for it on another thread"
            ),
            Self::RealtimeRefused {
                thread,
                setting,
                reason,
                ..
            } => write!(f, "thread '{thread}' requires {setting}: {reason}"),
            Self::Forked { operation } => write!(
                f,
                "cannot {operation}: the process was forked, and what it was made for stays with its parent; build a new runtime"
            ),
            Self::Os { operation, source } => write!(f, "{operation}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Os { source, .. } => Some(source),
            _ => None,
        }
    }
}
