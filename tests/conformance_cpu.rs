//! The conformance suite on the CPU backend.

mod conformance;

use ringkernel::{BackendType, RingKernelRuntime, RuntimeBuilder};

struct Cpu;

impl conformance::Subject for Cpu {
    fn builder() -> RuntimeBuilder {
        RingKernelRuntime::builder().backend(BackendType::Cpu)
    }
}

conformance!(crate::Cpu);
