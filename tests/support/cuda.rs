//! The CUDA driver of our own, from a test's side: a process that has loaded it, and what to tell it.

use std::ffi::{CStr, c_void};
use std::process::Command;
use std::sync::MutexGuard;

use crate::conformance::one_at_a_time;

#[path = "../fake_cuda/faults.rs"]
mod faults;
pub use faults::*;

/// Names the folder in which the fake driver compiles kernels; set where it is in use.
pub const FAKE: &str = "RINGKERNEL_FAKE_CUDA";

/// Set where rings shall lie in the memory of the fake driver's device.
pub const RINGS: &str = "RINGKERNEL_FAKE_RINGS";

fn symlink(target: &std::path::Path, link: &std::path::Path) {
    #[cfg(unix)]
    std::os::unix::fs::symlink(target, link).unwrap();
    #[cfg(not(unix))]
    let _ = (target, link);
}

/// Runs every other test of this file in a process of its own, on the fake driver.
pub fn run_on_the_fake(filters: &[&str], variables: &[(&str, &str)]) {
    if std::env::var_os(FAKE).is_some() {
        return;
    }
    let _one = one_at_a_time();
    if !cfg!(target_os = "linux") {
        println!("skipped: the fake driver is for Linux");
        return;
    }
    let required = std::env::var_os("RINGKERNEL_REQUIRE_COMPILERS").is_some();
    if Command::new("c++").arg("--version").output().is_err() {
        assert!(!required, "no C++ compiler (c++)");
        println!("skipped: no C++ compiler (c++)");
        return;
    }
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().unwrap().parent().unwrap();
    let fake = folder.join("examples/libfake_cuda.so");
    if !fake.exists() {
        assert!(!required, "the fake driver is not built");
        println!("skipped: the fake driver is not built (cargo build --example fake_cuda)");
        return;
    }
    let folder = format!("rk-cuda-{}-{}", std::process::id(), variables.len());
    let folder = std::env::temp_dir().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    symlink(&fake, &folder.join("libcuda.so"));
    symlink(&fake, &folder.join("libnvrtc.so"));
    let output = Command::new(&test)
        .args(["--test-threads=1", "--nocapture"])
        .args(filters)
        .envs(variables.iter().copied())
        .env(FAKE, &folder)
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .unwrap();
    let _ = std::fs::remove_dir_all(&folder);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(!text.contains("skipped:"), "{text}");
    assert!(!text.contains("fake CUDA:"), "{text}");
    let passed = text.lines().find(|line| line.starts_with("test result"));
    println!("on the fake driver: {}", passed.unwrap_or("no result"));
}

/// The fake driver, which this process has loaded; `None`, and the reason printed, where a real one may be.
pub struct Fake {
    _one: MutexGuard<'static, ()>,
}

/// Whether the fake driver's first device is one that Vulkan knows too: a software one.
pub fn has_vulkan() -> bool {
    // SAFETY: this is its signature.
    let has: extern "C" fn() -> bool =
        unsafe { std::mem::transmute(Fake::function(c"rk_fake_has_vulkan")) };
    let has = has();
    if !has {
        let required = std::env::var_os("RINGKERNEL_REQUIRE_VULKAN");
        assert!(required.is_none(), "no software Vulkan");
        println!("only with software Vulkan");
    }
    has
}

pub fn fake() -> Option<Fake> {
    let one = one_at_a_time();
    if std::env::var_os(FAKE).is_none() {
        println!("only on the fake driver");
        return None;
    }
    Some(Fake { _one: one })
}

impl Fake {
    pub fn function(name: &CStr) -> *mut c_void {
        let library = std::env::var(FAKE).unwrap() + "/libcuda.so\0";
        // SAFETY: the library is the fake driver, whose initialisers do nothing.
        unsafe {
            let library = libc::dlopen(library.as_ptr().cast(), libc::RTLD_NOW);
            assert!(!library.is_null());
            let function = libc::dlsym(library, name.as_ptr());
            assert!(!function.is_null());
            function
        }
    }

    pub fn arm(&self, fault: u32) {
        // SAFETY: this is its signature.
        let arm: extern "C" fn(u32) =
            unsafe { std::mem::transmute(Self::function(c"rk_fake_arm")) };
        arm(fault);
    }

    /// Contexts that are current on this thread.
    pub fn pushed(&self) -> usize {
        // SAFETY: this is its signature.
        let pushed: extern "C" fn() -> usize =
            unsafe { std::mem::transmute(Self::function(c"rk_fake_pushed")) };
        pushed()
    }

    pub fn live(&self) -> usize {
        // SAFETY: this is its signature.
        let live: extern "C" fn() -> usize =
            unsafe { std::mem::transmute(Self::function(c"rk_fake_live")) };
        live()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.arm(0);
    }
}
