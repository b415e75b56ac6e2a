//! rkyv in and out of a byte slot, without allocation.

use core::fmt;
use core::mem::MaybeUninit;
use core::num::NonZeroUsize;

use rkyv::api::access_with_context;
use rkyv::api::low::{LowDeserializer, LowSerializer, LowValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Failure;
use rkyv::ser::allocator::SubAllocator;
use rkyv::ser::writer::Buffer;
use rkyv::validation::Validator;
use rkyv::validation::archive::ArchiveValidator;
use rkyv::{Archive, Deserialize, Serialize};

use crate::error::HandlerError;

/// Alignment of every payload, in bytes: slots are 64-byte aligned, header and extension are multiples of 16.
pub const MAX_ALIGNMENT: usize = 16;

/// How many pointers (a `Box`, `Vec`, `String`, a node of a map) may lead one into the other in an archive that is
/// read.
///
/// Validating, decoding and dropping a value of a recursive type recurse once a level: without a bound the sender of
/// the bytes would decide how much stack the receiver needs. 128 is what `serde_json` allows (protobuf: 100).
/// Levels of 256 bytes each take some 300 KiB of stack without optimisation; a thread has 2 MiB. A type with levels
/// of many kilobytes needs a receiver with more.
pub const MAX_DEPTH: usize = 128;

/// The validator's count goes down at every pointer and at the root, and must not reach zero.
const DEPTH_COUNT: NonZeroUsize = match NonZeroUsize::new(MAX_DEPTH + 2) {
    Some(count) => count,
    None => unreachable!(),
};

/// Stack space for the serialiser's own bookkeeping, in bytes. Fixed-size messages use none of it; nested vectors
/// use a few words for each open level, so this is some sixty levels.
const SCRATCH_BYTES: usize = 1024;

/// Why a message could not be archived into, or read from, a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CodecError {
    /// The archived message does not fit into the slot.
    TooLarge,
    /// The bytes are no valid archive of the type, or nested deeper than [`MAX_DEPTH`].
    Invalid,
    /// The bytes do not lie on the boundary that the archived type needs.
    Misaligned,
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the archived message does not fit into the slot",
            Self::Invalid => "the bytes are no valid archive of the expected type",
            Self::Misaligned => "the archive is not aligned to 16 bytes",
        })
    }
}

impl core::error::Error for CodecError {}

impl From<CodecError> for HandlerError {
    fn from(error: CodecError) -> Self {
        match error {
            CodecError::TooLarge => Self::new(Self::REPLY_TOO_LARGE, "reply exceeds the slot"),
            CodecError::Invalid => Self::new(Self::BAD_REQUEST, "invalid archive"),
            CodecError::Misaligned => Self::new(Self::BAD_REQUEST, "misaligned archive"),
        }
    }
}

/// Archives `value` at the start of `slot` and returns the length used. Neither blocks nor allocates.
///
/// # Errors
/// [`CodecError::TooLarge`] if `slot` is too small; [`CodecError::Misaligned`] if it is not 16-byte aligned.
#[inline]
pub fn encode<T>(value: &T, slot: &mut [u8]) -> Result<usize, CodecError>
where
    T: for<'a> Serialize<LowSerializer<Buffer<'a>, SubAllocator<'a>, Failure>>,
{
    check_alignment::<T>(slot)?;
    let mut scratch = [MaybeUninit::<u8>::uninit(); SCRATCH_BYTES];
    rkyv::api::low::to_bytes_in_with_alloc::<_, _, Failure>(
        value,
        Buffer::from(slot),
        SubAllocator::new(&mut scratch),
    )
    .map(|written| written.len())
    .map_err(|_| CodecError::TooLarge)
}

/// Validates `bytes` as an archive of `T` and gives the archived value in place. Neither blocks nor allocates.
///
/// Takes time in proportion to the number of bytes, because no byte may belong to two values, and stack for
/// [`MAX_DEPTH`] levels at most, whatever the bytes are.
///
/// # Errors
/// [`CodecError::Invalid`] or [`CodecError::Misaligned`].
#[inline]
pub fn access<T>(bytes: &[u8]) -> Result<&T::Archived, CodecError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<LowValidator<'a, Failure>>,
{
    check_alignment::<T>(bytes)?;
    let archive = ArchiveValidator::with_max_depth(bytes, Some(DEPTH_COUNT));
    access_with_context::<T::Archived, _, Failure>(bytes, &mut Validator::new(archive, ()))
        .map_err(|_| CodecError::Invalid)
}

/// Validates `bytes` and makes an owned `T` of them. Does not block; allocates only if `T` does.
///
/// # Errors
/// As [`access`].
#[inline]
pub fn decode<T>(bytes: &[u8]) -> Result<T, CodecError>
where
    T: Archive,
    T::Archived:
        for<'a> CheckBytes<LowValidator<'a, Failure>> + Deserialize<T, LowDeserializer<Failure>>,
{
    let archived = access::<T>(bytes)?;
    rkyv::api::low::deserialize::<T, Failure>(archived).map_err(|_| CodecError::Invalid)
}

#[inline]
fn check_alignment<T: Archive>(bytes: &[u8]) -> Result<(), CodecError> {
    if bytes
        .as_ptr()
        .addr()
        .is_multiple_of(align_of::<T::Archived>())
    {
        Ok(())
    } else {
        Err(CodecError::Misaligned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
    struct Quote {
        bid: u64,
        side: bool,
    }

    #[repr(align(16))]
    struct Slot([u8; 64]);

    #[test]
    fn a_slot_one_byte_short_is_refused() {
        let quote = Quote { bid: 1, side: true };
        let mut slot = Slot([0; 64]);
        let length = encode(&quote, &mut slot.0).unwrap();
        assert_eq!(length, size_of::<ArchivedQuote>());
        assert_eq!(
            encode(&quote, &mut slot.0[..length - 1]),
            Err(CodecError::TooLarge)
        );
    }

    #[test]
    fn a_flipped_bool_is_refused_and_a_truncated_archive_too() {
        let mut slot = Slot([0; 64]);
        let length = encode(&Quote { bid: 1, side: true }, &mut slot.0).unwrap();
        slot.0[8] = 2;
        assert_eq!(decode::<Quote>(&slot.0[..length]), Err(CodecError::Invalid));
        slot.0[8] = 1;
        assert_eq!(
            decode::<Quote>(&slot.0[..length]),
            Ok(Quote { bid: 1, side: true })
        );
        for short in 0..length {
            assert!(decode::<Quote>(&slot.0[..short]).is_err());
        }
    }

    #[test]
    fn misaligned_bytes_are_an_error_of_their_own() {
        let mut slot = Slot([0; 64]);
        assert_eq!(
            encode(&Quote { bid: 1, side: true }, &mut slot.0[1..]),
            Err(CodecError::Misaligned)
        );
        assert_eq!(decode::<Quote>(&slot.0[1..17]), Err(CodecError::Misaligned));
    }
}
