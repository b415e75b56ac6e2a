//! The CPU backend: a thread per block of a grid. The reference for behaviour, and the default anywhere.

mod auto_spin;
mod berth;
mod device;
mod dispatch;
mod on_thread;
mod panics;
mod worker;

pub(crate) use berth::Berth;
pub(crate) use device::CpuBackend;
pub(crate) use on_thread::{running_here, runs_here};
pub(crate) use panics::install_hook;
