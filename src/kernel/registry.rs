//! Kernels that are known without being registered at a runtime: the built-in ones, and those of `register_kernel!`.

use super::builtin;
use super::registration::KernelRegistration;

/// Kernels registered at link time. Add to it by [`register_kernel!`](crate::register_kernel).
#[linkme::distributed_slice]
pub static KERNELS: [fn() -> KernelRegistration];

/// Registers a kernel at link time, from any crate of the program: every runtime knows it.
///
/// ```
/// use ringkernel::KernelRegistration;
///
/// fn doubler() -> KernelRegistration {
///     KernelRegistration::new("example.doubler").cpu_handler(|request, context| {
///         context.reply_bytes(&request.payload().repeat(2))
///     })
/// }
/// ringkernel::register_kernel!(DOUBLER, doubler);
///
/// # fn main() {
/// assert!(ringkernel::find_kernel("example.doubler").is_some());
/// # }
/// ```
#[macro_export]
macro_rules! register_kernel {
    ($name:ident, $make:path) => {
        #[$crate::__private::linkme::distributed_slice($crate::kernel::KERNELS)]
        #[linkme(crate = $crate::__private::linkme)]
        static $name: fn() -> $crate::KernelRegistration = $make;
    };
}

/// All kernels known at link time, the built-in ones first. Does not block; allocates.
#[must_use]
pub fn registered_kernels() -> Vec<KernelRegistration> {
    let mut kernels = builtin::all();
    kernels.extend(KERNELS.iter().map(|make| make()));
    kernels
}

/// The kernel of this id that was registered at link time or is built in. Those of `RuntimeBuilder::register` are
/// known to their runtime alone.
#[must_use]
pub fn find_kernel(id: &str) -> Option<KernelRegistration> {
    registered_kernels()
        .into_iter()
        .find(|kernel| kernel.id() == id)
}
