//! Replies as they reach a client: the end of its lane, and those that a call put aside.

use std::sync::Arc;

use super::calls::CALL_BIT;
use super::instance::KernelInstance;
use super::link::KernelLink;
use super::receive::uselessness;
use crate::backend::{HostConsumer, HostProducer};
use crate::bridge::LaneShared;
use crate::error::MessageError;
use crate::kernel::{DeadLetterReason, Lost};
use crate::message::MessageHeader;
use crate::ring::Peek;

/// Which reply is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Correlation of a call; 0 for any reply that is no call's.
    call: u32,
    /// Whether one that cannot be used stays where it is.
    is_patient: bool,
}

impl Wanted {
    /// The next reply, whatever it is.
    pub(super) const ANY: Self = Self {
        call: 0,
        is_patient: true,
    };
    /// As `ANY`, but one that cannot be used goes to the dead letters.
    pub(super) const ANY_OF_USE: Self = Self {
        call: 0,
        is_patient: false,
    };

    /// The reply to a call.
    pub(super) const fn call(correlation: u32) -> Self {
        Self {
            call: correlation,
            is_patient: false,
        }
    }
}

/// What is to be done with a reply that was found in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// It is wanted.
    Wanted,
    /// It is for `recv`, and a call goes on looking.
    Aside,
    /// Its call has timed out, or had its reply.
    Late,
}

impl Wanted {
    #[inline]
    pub(super) fn fit(self, header: &MessageHeader) -> Fit {
        let correlation = header.correlation();
        if self.call != 0 {
            match correlation {
                own if own == self.call => Fit::Wanted,
                other if other & CALL_BIT != 0 => Fit::Late,
                _ => Fit::Aside,
            }
        } else if correlation & CALL_BIT != 0 {
            Fit::Late
        } else {
            Fit::Wanted
        }
    }
}

/// The client's end for replies.
pub(super) struct ClientInbox {
    pub(super) instance: Arc<KernelInstance>,
    pub(super) shared: Arc<LaneShared>,
    replies: HostConsumer,
    aside_in: HostProducer,
    aside: HostConsumer,
    /// Replies that a call put aside.
    put_aside: usize,
}

impl ClientInbox {
    pub(super) fn new(
        instance: Arc<KernelInstance>,
        shared: Arc<LaneShared>,
        replies: HostConsumer,
        (aside_in, aside): (HostProducer, HostConsumer),
    ) -> Self {
        Self {
            instance,
            shared,
            replies,
            aside_in,
            aside,
            put_aside: 0,
        }
    }

    /// Whether the lane has a reply.
    pub(super) fn has_reply(&mut self) -> bool {
        !matches!(self.replies.peek(), Peek::Empty)
    }

    /// A reply that was put aside, handed to `read`.
    #[inline]
    pub(super) fn look_aside<R, F>(
        &mut self,
        wanted: Wanted,
        read: &mut Option<F>,
    ) -> Option<Result<R, MessageError>>
    where
        F: FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        if wanted.call != 0 || self.put_aside == 0 {
            return None;
        }
        let Peek::Ready = self.aside.peek() else {
            return None;
        };
        let outcome = read.take()?(&self.instance, self.aside.header(), self.aside.payload());
        let is_taken = self.settle(wanted, &outcome, |inbox| inbox.lost(&inbox.aside));
        if is_taken {
            self.aside.release();
            self.put_aside -= 1;
        }
        Some(outcome)
    }

    /// Gives everything up that the client has not received: it is gone.
    pub(super) fn give_up(&mut self) {
        for takes_aside in [true, false] {
            loop {
                let consumer = if takes_aside {
                    &mut self.aside
                } else {
                    &mut self.replies
                };
                let Peek::Ready = consumer.peek() else {
                    break;
                };
                let consumer = if takes_aside {
                    &self.aside
                } else {
                    &self.replies
                };
                let letters = &self.instance.signals.dead_letters;
                letters.reply(DeadLetterReason::Shutdown, &self.lost(consumer));
                let consumer = if takes_aside {
                    &mut self.aside
                } else {
                    &mut self.replies
                };
                consumer.release();
            }
        }
    }

    fn lost<'a>(&self, consumer: &'a HostConsumer) -> Lost<'a> {
        self.instance
            .lost(consumer.header(), consumer.extension(), consumer.payload())
    }

    /// A reply in the lane, handed to `read`. Those that are of no use are cleared away.
    #[inline]
    pub(super) fn look_in_lane<R, F>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        read: &mut Option<F>,
    ) -> Option<Result<R, MessageError>>
    where
        F: FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        let mut polls = polls;
        loop {
            let consumer = &mut self.replies;
            // The lane's rings are this process's own: what is there is what was put there.
            let Peek::Ready = consumer.peek_spinning(polls) else {
                return None;
            };
            polls = 1;
            match wanted.fit(consumer.header()) {
                Fit::Wanted => {
                    let outcome =
                        read.take()?(&self.instance, consumer.header(), consumer.payload());
                    let is_taken = self.settle(wanted, &outcome, Self::lost_in_lane);
                    if is_taken {
                        self.replies.release();
                    }
                    return Some(outcome);
                }
                Fit::Aside => self.set_aside(),
                Fit::Late => {
                    let lost = self.lost_in_lane();
                    let letters = &self.instance.signals.dead_letters;
                    letters.reply(DeadLetterReason::LateReply, &lost);
                    self.replies.release();
                }
            }
        }
    }

    /// Moves the reply at hand from the lane to those put aside.
    #[cold]
    fn set_aside(&mut self) {
        let consumer = &self.replies;
        let envelope = consumer.header().envelope(consumer.extension());
        self.aside.publish_cursor();
        match self.aside_in.try_push(&envelope, consumer.payload()) {
            Ok(()) => self.put_aside += 1,
            Err(_) => {
                let lost = self.lost_in_lane();
                let letters = &self.instance.signals.dead_letters;
                letters.reply(DeadLetterReason::InboxFull, &lost);
            }
        }
        self.replies.release();
    }

    fn lost_in_lane(&self) -> Lost<'_> {
        self.lost(&self.replies)
    }

    /// Counts what was made of a reply; false if it is to stay where it is.
    #[inline]
    pub(super) fn settle<'a, R>(
        &'a self,
        wanted: Wanted,
        outcome: &Result<R, MessageError>,
        lost: impl FnOnce(&'a Self) -> Lost<'a>,
    ) -> bool {
        match uselessness(outcome) {
            None => self.shared.delivered.add(1),
            Some(DeadLetterReason::Mismatch) if wanted.is_patient => return false,
            Some(reason) => self
                .instance
                .signals
                .dead_letters
                .reply(reason, &lost(self)),
        }
        true
    }
}
