//! Floor 1: every way in which something can fail.
//!
//! Message calls return small `Copy` enums that allocate nothing ([`TrySendError`] and its kin); a message is borrowed,
//! so a failed send leaves it with the caller. Everything else returns [`Error`], which names the kernel, device or
//! path it speaks of.

use core::fmt;

#[cfg(feature = "std")]
mod control;

#[cfg(feature = "std")]
pub use control::Error;

/// Why a kernel or a topic does not take or give messages at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unavailable {
    /// The kernel was launched but never activated.
    NotActivated,
    /// The kernel is deactivated; it keeps what is queued and takes nothing new.
    Deactivated,
    /// The runtime is draining and takes no new work.
    Draining,
    /// The kernel is ending or has ended on request.
    Terminated,
    /// The kernel has failed; `KernelHandle::status` tells why.
    Failed,
    /// The device is gone, and all its kernels with it.
    DeviceLost,
    /// The handle's endpoints were given away by `split` and are still held.
    Split,
    /// The kernel is connected: another kernel writes its requests, or reads its replies
    /// (`RingKernelRuntime::connect`).
    Connected,
    /// The kernels of a call through a pipeline are connected no more, or never were.
    NotConnected,
    /// The topic is closed: its runtime has shut down.
    Closed,
    /// The topic had publishers and has none any more. May change at any time.
    NoPublisher,
    /// The process is the child of a `fork`: what the handle leads to stays with the parent. A new
    /// runtime can be built.
    Forked,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotActivated => "the kernel has not been activated",
            Self::Deactivated => "the kernel is deactivated",
            Self::Draining => "the runtime is draining",
            Self::Terminated => "the kernel has terminated",
            Self::Failed => "the kernel has failed",
            Self::DeviceLost => "the device is lost",
            Self::Split => "the kernel's endpoints are split off",
            Self::Connected => "the kernel is connected to another one",
            Self::NotConnected => "the kernels are not connected",
            Self::Closed => "the topic is closed",
            Self::NoPublisher => "the topic has no publisher any more",
            Self::Forked => {
                "the process was forked, and what the handle leads to stays with its parent"
            }
        })
    }
}

/// Why a message itself was refused. Nothing of it has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rejection {
    /// The payload (with its extension, if it has one) exceeds the kernel's slots.
    TooLarge {
        /// Payload bytes that a slot has for it.
        max: usize,
    },
    /// The type's own serialiser refuses the value, or needs scratch memory that cannot be had:
    /// more than 16 times the slot, or more than the system gives. No other slot size helps.
    NotEncodable,
    /// The kernel was not registered for this type.
    UnknownType {
        /// The message's type id.
        type_id: u64,
    },
    /// The kernel's type table is full: it takes any type, and has met 64 already.
    TypeTableFull {
        /// The message's type id.
        type_id: u64,
    },
    /// A correlation at or above 2^31; the upper half belongs to `KernelHandle::call`.
    Correlation {
        /// The correlation asked for.
        correlation: u32,
    },
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { max } => write!(f, "the payload exceeds the slot's {max} bytes"),
            Self::NotEncodable => {
                f.write_str("the message's serialiser refuses it or lacks scratch memory")
            }
            Self::UnknownType { type_id } => {
                write!(
                    f,
                    "the kernel does not take messages of type {type_id:#018x}"
                )
            }
            Self::TypeTableFull { type_id } => write!(
                f,
                "no room for type {type_id:#018x} in the kernel's type table"
            ),
            Self::Correlation { correlation } => {
                write!(f, "correlation {correlation} is not below 2^31")
            }
        }
    }
}

/// Why a received message could not be returned as what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageError {
    /// The next message is of another type. It stays where it is: receive it as that type, or as bytes. (The reply of a
    /// `call` is taken all the same: it has nobody else to go to.)
    TypeMismatch {
        /// Type id asked for.
        expected: u64,
        /// Type id of the message; 0 for raw bytes.
        found: u64,
    },
    /// The message's header or archive is invalid. It has been taken and counted as a dead letter.
    Corrupt,
    /// The buffer is too small for the message. It stays where it is, but for the reply of a `call`.
    BufferTooSmall {
        /// Bytes of the message.
        length: usize,
    },
    /// The handler answered with an error. The reply has been taken.
    Handler(HandlerError),
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TypeMismatch { expected, found } => write!(
                f,
                "the message is of type {found:#018x}, not {expected:#018x}"
            ),
            Self::Corrupt => f.write_str("the message is corrupt"),
            Self::BufferTooSmall { length } => {
                write!(f, "the message has {length} bytes, the buffer fewer")
            }
            Self::Handler(error) => write!(f, "the handler failed: {error}"),
        }
    }
}

/// What a handler reports instead of a reply: a code and a short text, kept inline.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HandlerError {
    /// Chosen by the handler, or one of the constants below: the library's codes count down from
    /// `u32::MAX`.
    pub code: u32,
    length: u8,
    text: [u8; Self::MAX_TEXT],
}

impl HandlerError {
    /// Longest text that travels, in bytes: code and text fill the 48 bytes of a one-line message.
    pub const MAX_TEXT: usize = 44;

    /// Largest encoded size in bytes.
    pub const MAX_BYTES: usize = 4 + Self::MAX_TEXT;

    /// Code of the error that answers a request whose type the handler does not take.
    pub const BAD_REQUEST: u32 = u32::MAX;

    /// Code of the error of a reply that exceeds the reply ring's slots.
    pub const REPLY_TOO_LARGE: u32 = u32::MAX - 1;

    /// Code of the error of a reply that could not be written because the kernel is ending.
    pub const ENDING: u32 = u32::MAX - 2;

    /// Code of the error of a reply that its serialiser refuses, or that needs more scratch memory
    /// than can be had.
    pub const NOT_ENCODABLE: u32 = u32::MAX - 3;

    /// Code of the error of a reply that has to wait for room beside its ring, for which there is
    /// no memory.
    pub const OUT_OF_MEMORY: u32 = u32::MAX - 4;

    /// An error with this code and text; a longer text is cut at a character boundary.
    #[must_use]
    pub fn new(code: u32, text: &str) -> Self {
        let mut end = text.len().min(Self::MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = [0; Self::MAX_TEXT];
        bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
        Self {
            code,
            length: end as u8,
            text: bytes,
        }
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.text
            .get(..usize::from(self.length))
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or("")
    }

    /// Writes the error as the payload of an error reply and returns its length; a short `payload` cuts the text (and
    /// below four bytes the code).
    pub fn encode(&self, payload: &mut [u8]) -> usize {
        let mut bytes = [0; Self::MAX_BYTES];
        bytes[..4].copy_from_slice(&self.code.to_ne_bytes());
        bytes[4..].copy_from_slice(&self.text);
        let length = (4 + usize::from(self.length)).min(payload.len());
        payload[..length].copy_from_slice(&bytes[..length]);
        length
    }

    /// The inverse of [`encode`](Self::encode). Accepts anything: missing bytes are zero, a text that is not UTF-8 is cut there.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Self {
        let mut code = [0; 4];
        let code_bytes = payload.len().min(4);
        code[..code_bytes].copy_from_slice(&payload[..code_bytes]);
        let rest = payload.get(4..).unwrap_or(&[]);
        let rest = &rest[..rest.len().min(Self::MAX_TEXT)];
        let text = match core::str::from_utf8(rest) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or(""),
        };
        Self::new(u32::from_ne_bytes(code), text)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerError")
            .field("code", &self.code)
            .field("text", &self.text())
            .finish()
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "code {}", self.code)?;
        if !self.text().is_empty() {
            write!(f, ", {}", self.text())?;
        }
        Ok(())
    }
}

impl core::error::Error for HandlerError {}

impl From<&str> for HandlerError {
    fn from(text: &str) -> Self {
        Self::new(0, text)
    }
}

/// Declares a message-call error: variants with their texts, and `From` for the kinds it shares with its siblings.
macro_rules! channel_error {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$unit_meta:meta])* $unit:ident => $text:literal,)*
        @ $($(#[$wrap_meta:meta])* $wrap:ident($inner:ty),)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$unit_meta])* $unit,)*
            $($(#[$wrap_meta])* $wrap($inner),)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$unit => f.write_str($text),)*
                    $(Self::$wrap(inner) => inner.fmt(f),)*
                }
            }
        }

        impl core::error::Error for $name {}

        $(impl From<$inner> for $name {
            fn from(inner: $inner) -> Self {
                Self::$wrap(inner)
            }
        })*
    };
}

channel_error! {
    /// Why `try_send` sent nothing. The message is still the caller's.
    TrySendError {
        /// Every slot is taken. May change at any time.
        Full => "the request ring is full",
        /// Another thread holds the handle's sending side, or stands still in the middle of publishing to the topic. Never returned by an
        /// exclusive endpoint of a kernel.
        Busy => "another thread is sending",
        @
        /// The kernel, or the topic, takes nothing at the moment.
        Unavailable(Unavailable),
        /// The message itself is refused.
        Rejected(Rejection),
    }
}

channel_error! {
    /// Why a message that could not be delivered was not sent again.
    ReplayError {
        /// It is a reply.
        NotARequest => "it is a reply",
        /// Its header could not be read, its type is unknown, or part of its payload is missing.
        Incomplete => "not all of it is there",
        @
        /// It was not sent.
        Send(TrySendError),
    }
}

channel_error! {
    /// Why `send` or `send_timeout` sent nothing. The message is still the caller's.
    SendTimeoutError {
        /// The ring stayed full for the whole timeout.
        Timeout => "the request ring stayed full for the whole timeout",
        /// There is no room, and the client's [`Backpressure`](crate::Backpressure) says not to
        /// wait for it; or the sender is a handler of the kernel's only block, which makes none
        /// before it returns.
        Full => "there is no room",
        @
        /// The kernel takes nothing, or stopped taking messages during the wait.
        Unavailable(Unavailable),
        /// The message itself is refused.
        Rejected(Rejection),
    }
}

channel_error! {
    /// Why `try_recv` returned nothing.
    TryRecvError {
        /// There is no message. May change at any time.
        Empty => "no message is waiting",
        /// Another thread holds the handle's receiving side, or a publisher makes room in a subscriber's lane. Never returned by an exclusive
        /// endpoint of a kernel.
        Busy => "another thread is receiving",
        @
        /// The topic gives nothing any more. Or the kernel has ended. On request: every message it wrote has been received. By a failure: every message that
        /// was there when it was found to have failed.
        Unavailable(Unavailable),
        /// The next message is not what was asked for.
        Message(MessageError),
    }
}

channel_error! {
    /// Why `recv` or `recv_timeout` returned nothing.
    RecvTimeoutError {
        /// No message came within the timeout.
        Timeout => "no message came within the timeout",
        @
        /// The topic gives nothing any more. Or the kernel has ended. On request: every message it wrote has been received. By a failure: every message that
        /// was there when it was found to have failed.
        Unavailable(Unavailable),
        /// The next message is not what was asked for.
        Message(MessageError),
    }
}

channel_error! {
    /// Why `call` returned no reply.
    CallError {
        /// No reply came within the timeout. If the request was sent, its late reply goes to the dead letters.
        Timeout => "no reply came within the timeout",
        /// More calls are pending at once than the launch allows.
        TooManyCalls => "too many calls are pending at once",
        /// A handler calls its own kernel, or one that shares its thread: the reply could not come
        /// before the handler returns. Nothing has been sent.
        OwnKernel => "a handler cannot call the kernel that it belongs to, or one that shares its thread",
        @
        /// The kernel takes nothing, or ended during the wait.
        Unavailable(Unavailable),
        /// The request is refused.
        Rejected(Rejection),
        /// The reply is not what was asked for, or is an error of the handler.
        Message(MessageError),
    }
}

impl From<SendTimeoutError> for CallError {
    fn from(error: SendTimeoutError) -> Self {
        match error {
            SendTimeoutError::Timeout | SendTimeoutError::Full => Self::Timeout,
            SendTimeoutError::Unavailable(unavailable) => Self::Unavailable(unavailable),
            SendTimeoutError::Rejected(rejection) => Self::Rejected(rejection),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_codes_of_handler_errors_are_alike() {
        let codes = [
            HandlerError::BAD_REQUEST,
            HandlerError::REPLY_TOO_LARGE,
            HandlerError::ENDING,
            HandlerError::NOT_ENCODABLE,
            HandlerError::OUT_OF_MEMORY,
        ];
        for (index, code) in codes.iter().enumerate() {
            assert!(!codes[..index].contains(code), "{code:#x}");
        }
    }

    #[test]
    fn handler_errors_survive_a_round_trip_and_any_truncation() {
        let error = HandlerError::new(7, "quantity must not be zero");
        let mut payload = [0xff; HandlerError::MAX_BYTES];
        let length = error.encode(&mut payload);
        assert_eq!(HandlerError::decode(&payload[..length]), error);
        for short in 0..length {
            let decoded = HandlerError::decode(&payload[..short]);
            if short >= 4 {
                assert_eq!(decoded.code, 7);
            }
            assert!(error.text().starts_with(decoded.text()));
        }
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let text = "é".repeat(40);
        let error = HandlerError::new(0, &text);
        assert_eq!(error.text(), "é".repeat(22));
    }

    #[test]
    fn bytes_that_are_not_utf8_are_cut_there() {
        assert_eq!(HandlerError::decode(b"\0\0\0\0ab\xffcd").text(), "ab");
    }
}
