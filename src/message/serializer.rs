//! What archives are written with: a slot and scratch memory, each of which tells whether it was
//! too small.

use core::alloc::Layout;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use rkyv::rancor::Source;
use rkyv::ser::allocator::SubAllocator;
use rkyv::ser::writer::Buffer;
use rkyv::ser::{Allocator, Positional, Writer};

/// Writes an archive into a slot.
#[derive(Debug)]
pub struct SlotWriter<'a> {
    buffer: Buffer<'a>,
    is_full: bool,
}

impl<'a> SlotWriter<'a> {
    pub(super) fn new(slot: &'a mut [u8]) -> Self {
        Self {
            buffer: Buffer::from(slot),
            is_full: false,
        }
    }

    /// Whether something did not fit.
    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }
}

impl Positional for SlotWriter<'_> {
    #[inline]
    fn pos(&self) -> usize {
        self.buffer.pos()
    }
}

impl<E: Source> Writer<E> for SlotWriter<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.buffer
            .write(bytes)
            .inspect_err(|_| self.is_full = true)
    }
}

/// Scratch memory of the serialiser.
#[derive(Debug)]
pub struct Scratch<'a> {
    memory: SubAllocator<'a>,
    is_exhausted: bool,
}

impl<'a> Scratch<'a> {
    pub(super) fn new(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        Self {
            memory: SubAllocator::new(memory),
            is_exhausted: false,
        }
    }

    /// Whether there was too little of it.
    pub(super) fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }
}

// SAFETY: every allocation is the inner allocator's, which keeps the trait's promise.
unsafe impl<E: Source> Allocator<E> for Scratch<'_> {
    #[inline]
    unsafe fn push_alloc(&mut self, layout: Layout) -> Result<NonNull<[u8]>, E> {
        // SAFETY: the caller's promise is the inner allocator's condition.
        unsafe { self.memory.push_alloc(layout) }.inspect_err(|_: &E| self.is_exhausted = true)
    }

    #[inline]
    unsafe fn pop_alloc(&mut self, ptr: NonNull<u8>, layout: Layout) -> Result<(), E> {
        // SAFETY: as above; both kinds of calls are handed on.
        unsafe { self.memory.pop_alloc(ptr, layout) }
    }
}
