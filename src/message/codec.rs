//! rkyv in and out of a byte slot, without allocation.

use core::fmt;
use core::mem::MaybeUninit;
use core::num::NonZeroUsize;

use rkyv::api::low::{LowDeserializer, LowSerializer, LowValidator};
use rkyv::api::{access_with_context, serialize_using};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Failure;
use rkyv::ser::{Positional, Serializer};
use rkyv::validation::Validator;
use rkyv::validation::archive::ArchiveValidator;
use rkyv::{Archive, Deserialize, Serialize};

pub use super::serializer::{Scratch, SlotWriter};
use crate::error::HandlerError;

/// Alignment of every payload, in bytes: slots are 64-byte aligned, header and extension are multiples of 16.
pub const MAX_ALIGNMENT: usize = 16;

/// How many pointers (a `Box`, `Vec`, `String`, a node of a map) may lead one into the other in an
/// archive that is read.
///
/// Validating, decoding and dropping a value of a recursive type recurse once a level: without a
/// bound the sender of the bytes would decide how much stack the receiver needs. 128 is what
/// `serde_json` allows (protobuf: 100). Levels of 256 bytes each take some 300 KiB of stack without
/// optimisation; a thread has 2 MiB. A type with levels of many kilobytes needs a receiver with
/// more.
pub const MAX_DEPTH: usize = 128;

/// The validator's count goes down at every pointer and at the root, and must not reach zero.
const DEPTH_COUNT: NonZeroUsize = match NonZeroUsize::new(MAX_DEPTH + 2) {
    Some(count) => count,
    None => unreachable!(),
};

/// Stack space for the serialiser's own bookkeeping, in bytes. A vector whose elements are not
/// plain numbers uses it: for each element a few bytes (a position for a `String`, one byte for an
/// `Option`) until the vector is written. A message of fixed size uses none of it.
pub const SCRATCH_BYTES: usize = 1024;

/// Why a message could not be archived into, or read from, a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CodecError {
    /// The archived message does not fit into the slot.
    TooLarge,
    /// The serialiser needs more scratch memory than there is ([`SCRATCH_BYTES`], or what
    /// [`encode_with`] was given).
    Scratch,
    /// The type's own serialiser refused the value; no slot takes it.
    Refused,
    /// The bytes are no valid archive of the type, or nested deeper than [`MAX_DEPTH`].
    Invalid,
    /// The bytes do not lie on the boundary that the archived type needs.
    Misaligned,
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the archived message does not fit into the slot",
            Self::Scratch => "the serialiser needs more scratch memory than it has",
            Self::Refused => "the type's own serialiser refuses the value",
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
            CodecError::Scratch => Self::new(Self::NOT_ENCODABLE, "no memory for scratch"),
            CodecError::Refused => {
                Self::new(Self::NOT_ENCODABLE, "the serialiser refuses the reply")
            }
            CodecError::Invalid => Self::new(Self::BAD_REQUEST, "invalid archive"),
            CodecError::Misaligned => Self::new(Self::BAD_REQUEST, "misaligned archive"),
        }
    }
}

/// What a ring message is serialised with.
pub type Encoder<'a> = LowSerializer<SlotWriter<'a>, Scratch<'a>, Failure>;

/// Archives `value` at the start of `slot` and returns the length used. Neither blocks nor allocates.
///
/// # Errors
/// [`CodecError::TooLarge`] if `slot` is too small; [`CodecError::Misaligned`] if it is not 16-byte
/// aligned; [`CodecError::Scratch`] if the serialiser needs more than [`SCRATCH_BYTES`] for its own
/// bookkeeping, which [`encode_with`] can give it; [`CodecError::Refused`].
#[inline]
pub fn encode<T>(value: &T, slot: &mut [u8]) -> Result<usize, CodecError>
where
    T: for<'a> Serialize<Encoder<'a>>,
{
    let mut scratch = [MaybeUninit::<u8>::uninit(); SCRATCH_BYTES];
    encode_with(value, slot, &mut scratch)
}

/// As [`encode`], with scratch memory of the caller's. As many bytes as the slot has are enough for
/// vectors, strings, boxes and options, nested as may be; a hash map needs up to eight times as
/// many.
///
/// # Errors
/// As `encode`.
#[inline]
pub fn encode_with<T>(
    value: &T,
    slot: &mut [u8],
    scratch: &mut [MaybeUninit<u8>],
) -> Result<usize, CodecError>
where
    T: for<'a> Serialize<Encoder<'a>>,
{
    check_alignment::<T>(slot)?;
    let mut serializer = Serializer::new(SlotWriter::new(slot), Scratch::new(scratch), ());
    match serialize_using::<_, Failure>(value, &mut serializer) {
        Ok(_) => Ok(serializer.writer.pos()),
        Err(Failure) if serializer.writer.is_full() => Err(CodecError::TooLarge),
        Err(Failure) if serializer.allocator.is_exhausted() => Err(CodecError::Scratch),
        Err(Failure) => Err(CodecError::Refused),
    }
}

/// Validates `bytes` as an archive of `T` and gives the archived value in place. Neither blocks nor allocates.
///
/// Takes time in proportion to the number of bytes, because no byte may belong to two values, and
/// stack for [`MAX_DEPTH`] levels at most, whatever the bytes are.
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
