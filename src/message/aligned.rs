//! Bytes outside of a ring that are as aligned as in a slot.

use super::codec::MAX_ALIGNMENT;

/// A buffer of fixed size on the heap that begins at a multiple of [`MAX_ALIGNMENT`] on every
/// target. (No integer has that alignment everywhere: `u128` has 8 on 32-bit ARM and s390x.)
pub(crate) struct AlignedBytes {
    units: Box<[Unit]>,
}

#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Unit([u8; MAX_ALIGNMENT]);

const _: () = assert!(align_of::<Unit>() == MAX_ALIGNMENT && size_of::<Unit>() == MAX_ALIGNMENT);

// SAFETY: an array of bytes may hold all zeros.
unsafe impl bytemuck::Zeroable for Unit {}
// SAFETY: an array of bytes takes any bytes; the assertion above says that there is no padding
// behind it, `repr(C)` that there is none before it. It is `Copy` and holds no pointer.
unsafe impl bytemuck::Pod for Unit {}

impl AlignedBytes {
    /// Zeros, at least `bytes` of them; `None` if there is no memory for it. Every page is written
    /// to, so that no later use faults one in.
    pub(crate) fn try_zeroed(bytes: usize) -> Option<Self> {
        let count = bytes.div_ceil(MAX_ALIGNMENT);
        let mut units = Vec::new();
        units.try_reserve_exact(count).ok()?;
        units.resize(count, Unit([0; MAX_ALIGNMENT]));
        Some(Self {
            units: units.into_boxed_slice(),
        })
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.units)
    }
}

impl std::ops::DerefMut for AlignedBytes {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.units)
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_as_aligned_as_a_slot() {
        for bytes in [0, 1, 15, 16, 17, 48, 4096, 1 << 20] {
            let buffer = AlignedBytes::try_zeroed(bytes).unwrap();
            assert!(buffer.as_ptr().addr().is_multiple_of(MAX_ALIGNMENT));
            assert_eq!(buffer.len(), bytes.next_multiple_of(MAX_ALIGNMENT));
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn memory_that_is_not_there_is_no_abort() {
        assert!(AlignedBytes::try_zeroed(usize::MAX).is_none());
        assert!(AlignedBytes::try_zeroed(isize::MAX as usize - 15).is_none());
    }
}
