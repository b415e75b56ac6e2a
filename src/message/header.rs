//! The 16-byte message header and its optional 32-byte extension.

/// Size of [`MessageHeader`] in bytes, the part of a slot in front of the payload.
pub const HEADER_BYTES: usize = 16;

/// Size of [`Extension`] in bytes, between header and payload of an extended message.
pub const EXTENSION_BYTES: usize = 32;

/// Largest payload that the header's 24-bit length field can describe, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = LENGTH_MASK as usize;

const LENGTH_MASK: u32 = 0x00ff_ffff;
const PRIORITY_SHIFT: u32 = 24;
const PRIORITY_MASK: u32 = 0b11 << PRIORITY_SHIFT;
const ERROR_BIT: u32 = 1 << 26;
const EXTENDED_BIT: u32 = 1 << 27;

/// Masks of the second word: length, priority, error reply, extended.
#[cfg(all(test, not(loom), feature = "vulkan"))]
pub(crate) const FLAG_MASKS: [u32; 4] = [LENGTH_MASK, PRIORITY_MASK, ERROR_BIT, EXTENDED_BIT];

/// Urgency of a message, two bits of the header's flags. It travels with the message, and replies carry it back; a
/// ring delivers in order whatever it says, so that acting on it is up to the handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Priority {
    /// The lowest level.
    Low = 0,
    /// The level of a message that asks for nothing.
    #[default]
    Normal = 1,
    /// Above normal traffic.
    High = 2,
    /// The highest level.
    Critical = 3,
}

impl Priority {
    const fn from_bits(bits: u32) -> Self {
        match bits & 0b11 {
            0 => Self::Low,
            1 => Self::Normal,
            2 => Self::High,
            _ => Self::Critical,
        }
    }
}

/// What the sender of a message decides, apart from the payload itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Envelope {
    /// Chosen by the requester and copied into every reply; 0 means "not correlated".
    pub correlation: u32,
    /// Index into the kernel's type table; [`RAW_KIND`](crate::message::RAW_KIND) for raw bytes.
    pub kind: u16,
    /// The client lane that the message belongs to; 0 on a ring of one client.
    pub lane: u16,
    /// Urgency.
    pub priority: Priority,
    /// The payload describes a failed request.
    pub error: bool,
    /// Timestamp, deadline and trace id, for messages that carry them.
    pub extension: Option<Extension>,
}

impl Envelope {
    /// The header words that do not depend on the payload.
    #[inline]
    #[must_use]
    pub(crate) const fn head(&self) -> Head {
        let mut flags = (self.priority as u32) << PRIORITY_SHIFT;
        if self.error {
            flags |= ERROR_BIT;
        }
        if self.extension.is_some() {
            flags |= EXTENDED_BIT;
        }
        Head {
            correlation: self.correlation,
            flags,
            kind_lane: self.kind as u32 | ((self.lane as u32) << 16),
        }
    }
}

/// The header words of a message whose payload is still to be written: three registers on the hot path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) correlation: u32,
    /// The second word without its length.
    flags: u32,
    pub(crate) kind_lane: u32,
}

impl Head {
    /// A plain message of this kind.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn of_kind(kind: u16) -> Self {
        Self {
            correlation: 0,
            flags: (Priority::Normal as u32) << PRIORITY_SHIFT,
            kind_lane: kind as u32,
        }
    }

    /// The same with a correlation.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn correlated(self, correlation: u32) -> Self {
        Self {
            correlation,
            ..self
        }
    }

    /// The same on a lane.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn on_lane(self, lane: u16) -> Self {
        Self {
            kind_lane: (self.kind_lane & 0xffff) | ((lane as u32) << 16),
            ..self
        }
    }

    /// The kind.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn kind(self) -> u16 {
        self.kind_lane as u16
    }

    /// The same message under another kind.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn with_kind(self, kind: u16) -> Self {
        Self {
            kind_lane: kind as u32 | (self.kind_lane & 0xffff_0000),
            ..self
        }
    }

    /// The message's priority, 0 to 3.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn level(self) -> usize {
        ((self.flags & PRIORITY_MASK) >> PRIORITY_SHIFT) as usize
    }

    /// The header's second word for a payload of `length` bytes, which the ring has checked against its slots.
    #[inline]
    pub(crate) const fn length_flags(self, length: usize) -> u32 {
        (length as u32 & LENGTH_MASK) | self.flags
    }

    /// Bytes that the extension takes in front of the payload.
    #[inline]
    pub(crate) const fn extension_bytes(self) -> usize {
        if self.flags & EXTENDED_BIT == 0 {
            0
        } else {
            EXTENSION_BYTES
        }
    }
}

/// The four words in front of every payload, as they lie in the slot.
///
/// | word | content | written by |
/// |---|---|---|
/// | 0 | `sequence` | producer, last |
/// | 1 | `correlation` | producer |
/// | 2 | `length` (bits 0-23, bytes), priority (24-25), error reply (26), extended (27) | producer |
/// | 3 | `kind` (bits 0-15), `lane` (16-31) | producer |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MessageHeader {
    sequence: u32,
    correlation: u32,
    length_flags: u32,
    kind_lane: u32,
}

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<MessageHeader>() == HEADER_BYTES);
    assert!(align_of::<MessageHeader>() == 4);
    assert!(offset_of!(MessageHeader, sequence) == 0);
    assert!(offset_of!(MessageHeader, correlation) == 4);
    assert!(offset_of!(MessageHeader, length_flags) == 8);
    assert!(offset_of!(MessageHeader, kind_lane) == 12);
    assert!(size_of::<Extension>() == EXTENSION_BYTES);
    assert!(offset_of!(Extension, timestamp_ns) == 0);
    assert!(offset_of!(Extension, deadline_ns) == 8);
    assert!(offset_of!(Extension, trace_id) == 16);
};

impl MessageHeader {
    /// A header from its four words, as a consumer reads them. Every bit pattern is accepted; nothing is checked.
    #[inline]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self {
            sequence: words[0],
            correlation: words[1],
            length_flags: words[2],
            kind_lane: words[3],
        }
    }

    /// Position of the message in its ring, plus one.
    #[inline]
    #[must_use]
    pub const fn sequence(&self) -> u32 {
        self.sequence
    }

    /// The requester's correlation; 0 means "not correlated".
    #[inline]
    #[must_use]
    pub const fn correlation(&self) -> u32 {
        self.correlation
    }

    /// Payload length in bytes, 0 to [`MAX_PAYLOAD_BYTES`], without header and extension.
    #[inline]
    #[must_use]
    pub const fn length(&self) -> usize {
        (self.length_flags & LENGTH_MASK) as usize
    }

    /// Index into the kernel's type table.
    #[inline]
    #[must_use]
    pub const fn kind(&self) -> u16 {
        self.kind_lane as u16
    }

    /// Client lane.
    #[inline]
    #[must_use]
    pub const fn lane(&self) -> u16 {
        (self.kind_lane >> 16) as u16
    }

    /// Urgency.
    #[inline]
    #[must_use]
    pub const fn priority(&self) -> Priority {
        Priority::from_bits((self.length_flags & PRIORITY_MASK) >> PRIORITY_SHIFT)
    }

    /// Whether this is the reply to a request that failed.
    #[inline]
    #[must_use]
    pub const fn is_error(&self) -> bool {
        self.length_flags & ERROR_BIT != 0
    }

    /// Whether an [`Extension`] lies between header and payload.
    #[inline]
    #[must_use]
    pub const fn is_extended(&self) -> bool {
        self.length_flags & EXTENDED_BIT != 0
    }

    /// The same on a lane.
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn on_lane(self, lane: u16) -> Self {
        Self {
            kind_lane: (self.kind_lane & 0xffff) | ((lane as u32) << 16),
            ..self
        }
    }

    /// The header without its sequence and length.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn head(&self) -> Head {
        Head {
            correlation: self.correlation,
            flags: self.length_flags & !LENGTH_MASK,
            kind_lane: self.kind_lane,
        }
    }

    /// The head of a reply of this kind: to the same correlation and lane, of the same priority, and extended if the
    /// request was.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn reply_head(&self, kind: u16) -> Head {
        Head {
            correlation: self.correlation,
            flags: self.length_flags & (PRIORITY_MASK | EXTENDED_BIT),
            kind_lane: kind as u32 | (self.kind_lane & 0xffff_0000),
        }
    }

    /// The head of an error reply, which is never extended.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) const fn error_head(&self) -> Head {
        let head = self.reply_head(0);
        Head {
            flags: (head.flags & PRIORITY_MASK) | ERROR_BIT,
            ..head
        }
    }

    /// The envelope that this header travelled in; the extension is read separately.
    #[inline]
    #[must_use]
    pub const fn envelope(&self, extension: Option<Extension>) -> Envelope {
        Envelope {
            correlation: self.correlation,
            kind: self.kind(),
            lane: self.lane(),
            priority: self.priority(),
            error: self.is_error(),
            extension,
        }
    }
}

/// What a message may carry behind its header, at the cost of 32 bytes of its slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Extension {
    /// When the message was sent, in nanoseconds since the Unix epoch; 0 means "not stamped". All bits of an `HlcTimestamp` if a
    /// hybrid logical clock stamped it.
    pub timestamp_ns: u64,
    /// When the message stops being of use, in nanoseconds since the Unix epoch; 0 means "never".
    pub deadline_ns: u64,
    /// A W3C trace id, big-endian bytes; all zero means "not traced".
    pub trace_id: [u8; 16],
}

impl Extension {
    /// The extension as it lies in a slot, in the byte order of this machine.
    #[inline]
    pub(crate) fn to_bytes(self) -> [u8; EXTENSION_BYTES] {
        let mut bytes = [0; EXTENSION_BYTES];
        bytes[0..8].copy_from_slice(&self.timestamp_ns.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.deadline_ns.to_ne_bytes());
        bytes[16..32].copy_from_slice(&self.trace_id);
        bytes
    }

    /// The inverse of `to_bytes`.
    #[inline]
    pub(crate) fn from_bytes(bytes: &[u8; EXTENSION_BYTES]) -> Self {
        let [
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            d0,
            d1,
            d2,
            d3,
            d4,
            d5,
            d6,
            d7,
            trace_id @ ..,
        ] = *bytes;
        Self {
            timestamp_ns: u64::from_ne_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
            deadline_ns: u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, d6, d7]),
            trace_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_words_survive_a_round_trip() {
        for priority in [
            Priority::Low,
            Priority::Normal,
            Priority::High,
            Priority::Critical,
        ] {
            for (error, extension) in [(false, None), (true, Some(Extension::default()))] {
                let envelope = Envelope {
                    correlation: 0xdead_beef,
                    kind: 0xfffe,
                    lane: 0x8001,
                    priority,
                    error,
                    extension,
                };
                let head = envelope.head();
                let header = MessageHeader::from_words([
                    7,
                    head.correlation,
                    head.length_flags(MAX_PAYLOAD_BYTES),
                    head.kind_lane,
                ]);
                assert_eq!(header.sequence(), 7);
                assert_eq!(header.length(), MAX_PAYLOAD_BYTES);
                assert_eq!(header.is_extended(), extension.is_some());
                assert_eq!(header.envelope(extension), envelope);
            }
        }
    }

    #[test]
    fn extension_bytes_survive_a_round_trip() {
        let extension = Extension {
            timestamp_ns: u64::MAX - 1,
            deadline_ns: 42,
            trace_id: *b"0123456789abcdef",
        };
        assert_eq!(Extension::from_bytes(&extension.to_bytes()), extension);
    }
}
