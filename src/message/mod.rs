//! Floor 2: what travels. Headers, typed messages, and the way in and out of a byte slot.
//!
//! Nothing here knows of rings or devices, and nothing here needs an operating system.

#[cfg(all(feature = "std", not(loom)))]
mod aligned;
pub mod codec;
#[cfg(all(feature = "std", not(loom)))]
mod encoder;
mod header;
mod ring_message;
mod serializer;

#[cfg(all(feature = "std", not(loom)))]
pub(crate) use aligned::AlignedBytes;
#[cfg(all(feature = "std", not(loom)))]
pub(crate) use encoder::MessageEncoder;
#[cfg(all(test, not(loom), feature = "vulkan"))]
pub(crate) use header::FLAG_MASKS;
pub(crate) use header::Head;
pub use header::{
    EXTENSION_BYTES, Envelope, Extension, HEADER_BYTES, MAX_PAYLOAD_BYTES, MessageHeader, Priority,
};
pub use ring_message::{RAW_KIND, RingMessage, type_id_of};
