//! The CPU backend: a thread per block of a grid. The reference for behaviour, and the default anywhere.

mod device;
mod dispatch;
mod worker;

pub(crate) use device::CpuBackend;
