//! In builds without Vulkan, or for systems without its file descriptors: no memory of the GPU's own that the host can write.

use std::convert::Infallible;
use std::ptr::NonNull;
use std::sync::Arc;

/// There is none.
#[derive(Debug)]
pub struct Bar(Infallible);

/// There is none.
#[derive(Debug)]
pub struct BarMemory(Infallible);

impl Bar {
    pub fn open(_uuid: [u8; 16]) -> Result<Arc<Self>, String> {
        Err("this build lacks the feature `vulkan`, or this system its file descriptors".into())
    }

    pub fn is_dedicated(&self) -> bool {
        match self.0 {}
    }

    pub fn take(self: &Arc<Self>, _bytes: u64) -> Result<(BarMemory, Exported), NotGiven> {
        match self.0 {}
    }
}

impl BarMemory {
    pub fn start(&self) -> NonNull<u8> {
        match self.0 {}
    }

    pub fn bytes(&self) -> u64 {
        match self.0 {}
    }
}

/// Why there is no piece.
#[derive(Debug)]
pub struct NotGiven {
    pub out_of_memory: bool,
    pub reason: String,
}

/// There is none.
#[derive(Debug)]
pub struct Exported(Infallible);

impl Exported {
    pub fn fd(&self) -> i32 {
        match self.0 {}
    }

    pub fn give_away(self) {
        match self.0 {}
    }
}
