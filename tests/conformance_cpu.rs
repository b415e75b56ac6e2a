//! The conformance suite on the CPU backend.

// Some of the suite is for devices.
#[allow(dead_code)]
mod conformance;

use ringkernel::{BackendType, RingKernelRuntime, RuntimeBuilder, RuntimeConfig};

struct Cpu;

impl conformance::Subject for Cpu {
    const THREADS: bool = true;

    fn builder_with(config: RuntimeConfig) -> RuntimeBuilder {
        RingKernelRuntime::builder()
            .backend(BackendType::Cpu)
            .config(config)
    }
}

conformance!(crate::Cpu);

mod traces {
    crate::conformance! { traces: crate::Cpu }
}
