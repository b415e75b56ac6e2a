//! Typed messages: a stable type id, and the way in and out of a slot.

use core::mem::MaybeUninit;

use super::codec::CodecError;

/// The kind of a message that is raw bytes rather than a declared type.
pub const RAW_KIND: u16 = 0;

/// A type that can travel through a ring.
///
/// Declare it with [`ring_message!`](crate::ring_message) for any type that derives rkyv's `Archive`, `Serialize`
/// and `Deserialize`. The archived form is written straight into the slot and can be read there in place.
///
/// Both sides must agree on the layout that belongs to [`TYPE_ID`](RingMessage::TYPE_ID): change the declared name
/// (`"orders.New.v2"`) whenever the fields change.
///
/// A sender needs no more memory than its slot and, for vectors of anything but plain numbers and
/// for maps, scratch memory of the same size, which it takes at set-up where slots are larger than
/// [`SCRATCH_BYTES`](crate::message::codec::SCRATCH_BYTES). Only for a hash map of small entries
/// that exceeds even that it allocates, once, when such a message is sent first.
///
/// What the receiver of such a type spends on a message is bounded, whatever its bytes are: time
/// and memory are proportional to their number, and a recursive type is read
/// [`MAX_DEPTH`](crate::message::codec::MAX_DEPTH) levels deep. One kind of type is outside of
/// this: a vector of elements without any archived bytes (`Vec<()>`), of which a few bytes can
/// claim 2^32. Do not receive such a type from a sender that is not trusted.
pub trait RingMessage: rkyv::Archive + Sized {
    /// Stable identity of the type, agreed with the kernel at launch and checked on every receive.
    const TYPE_ID: u64;

    /// The declared name, for error texts.
    const NAME: &'static str;

    /// Archives the message at the start of `slot` and returns its length in bytes. Does not block; does not
    /// allocate unless the type's own serialiser does.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`] if `slot` is too small, in which case `slot` may hold a part of the
    /// message; [`CodecError::Scratch`] if the serialiser needs more memory for its own bookkeeping
    /// than it has.
    fn encode(&self, slot: &mut [u8]) -> Result<usize, CodecError>;

    /// As [`encode`](RingMessage::encode), with scratch memory of the sender's instead of a
    /// kilobyte on the stack. A sender calls it after `encode` has failed with
    /// [`CodecError::Scratch`]. By default there is no difference.
    ///
    /// # Errors
    /// As `encode`; [`CodecError::Scratch`] if `scratch` is too small.
    fn encode_with(
        &self,
        slot: &mut [u8],
        scratch: &mut [MaybeUninit<u8>],
    ) -> Result<usize, CodecError> {
        let _ = scratch;
        self.encode(slot)
    }

    /// Validates `bytes` and gives the archived form that lies in them. Neither blocks nor allocates.
    ///
    /// # Errors
    /// [`CodecError::Invalid`] if the bytes are no valid archive of this type, [`CodecError::Misaligned`] if they do
    /// not lie on a boundary of 16 bytes.
    fn access(bytes: &[u8]) -> Result<&Self::Archived, CodecError>;

    /// Validates `bytes` and makes an owned value of them. Does not block; allocates only if the type does (a `Vec`).
    ///
    /// # Errors
    /// As [`access`](RingMessage::access).
    fn decode(bytes: &[u8]) -> Result<Self, CodecError>;
}

/// The type id that belongs to a declared name: its 64-bit FNV-1a hash.
///
/// Constants from the FNV specification (draft-eastlake-fnv, section 5): offset basis `0xcbf29ce484222325`, prime
/// `0x100000001b3`.
#[must_use]
pub const fn type_id_of(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut index = 0;
    while index < bytes.len() {
        hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

/// Declares that a type travels through rings, under a stable name.
///
/// The type must derive rkyv's `Archive`, `Serialize` and `Deserialize`, and its archived form must not need an
/// alignment above 16 bytes (checked at compile time).
///
/// ```
/// use ringkernel::message::RingMessage;
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
/// struct Order { id: u64, price: u32, quantity: u32 }
/// ringkernel::ring_message!(Order, "example.Order.v1");
///
/// #[repr(align(16))]
/// struct Slot([u8; 48]);
/// let mut slot = Slot([0; 48]);
/// let order = Order { id: 7, price: 101, quantity: 3 };
/// let length = order.encode(&mut slot.0)?;
/// assert_eq!(Order::access(&slot.0[..length])?.id, 7);
/// assert_eq!(Order::decode(&slot.0[..length])?, order);
/// # Ok::<(), ringkernel::message::codec::CodecError>(())
/// ```
#[macro_export]
macro_rules! ring_message {
    ($type:ty, $name:literal) => {
        const _: () = assert!(
            ::core::mem::align_of::<<$type as $crate::__private::rkyv::Archive>::Archived>()
                <= $crate::message::codec::MAX_ALIGNMENT,
            "the archived form of a ring message must not need more than 16 bytes of alignment"
        );
        impl $crate::message::RingMessage for $type {
            const TYPE_ID: u64 = $crate::message::type_id_of($name);
            const NAME: &'static str = $name;
            #[inline]
            fn encode(
                &self,
                slot: &mut [u8],
            ) -> ::core::result::Result<usize, $crate::message::codec::CodecError> {
                $crate::message::codec::encode(self, slot)
            }
            #[inline]
            fn encode_with(
                &self,
                slot: &mut [u8],
                scratch: &mut [::core::mem::MaybeUninit<u8>],
            ) -> ::core::result::Result<usize, $crate::message::codec::CodecError> {
                $crate::message::codec::encode_with(self, slot, scratch)
            }
            #[inline]
            fn access(
                bytes: &[u8],
            ) -> ::core::result::Result<&Self::Archived, $crate::message::codec::CodecError> {
                $crate::message::codec::access::<$type>(bytes)
            }
            #[inline]
            fn decode(
                bytes: &[u8],
            ) -> ::core::result::Result<Self, $crate::message::codec::CodecError> {
                $crate::message::codec::decode::<$type>(bytes)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_ids_match_published_fnv1a_vectors() {
        // Test vectors of the FNV reference distribution.
        assert_eq!(type_id_of(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(type_id_of("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(type_id_of("foobar"), 0x8594_4171_f739_67e8);
    }
}
