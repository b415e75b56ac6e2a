//! What parties were told, and what they saw of it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a party knows of a message that it tried to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is taken, and comes back once or becomes a letter once.
    Taken,
    /// It is taken; whether anything comes back of it is the handler's business.
    TakenForGood,
    /// It is not taken.
    Refused,
    /// It may have been taken: a call timed out.
    Unknown,
}

#[derive(Debug)]
struct Entry {
    told: Told,
    kernel: String,
    seen: Vec<String>,
}

/// All messages that have a number.
#[derive(Debug, Default)]
pub struct Ledger {
    next: AtomicU64,
    entries: Mutex<HashMap<u64, Entry>>,
    /// Requests that were taken, and that may have been.
    pub taken: AtomicU64,
    pub unknown: AtomicU64,
    /// Replies received.
    pub received: AtomicU64,
    /// Messages of topics that were taken.
    pub published: AtomicU64,
}

/// Bytes of a message: what the handler is to do, and its number.
pub type Message = [u8; 16];

/// Marks messages that are not followed: those of topics, of which each subscriber has one.
const UNFOLLOWED: u64 = 1 << 63;

impl Ledger {
    /// A message whose first byte is for the handler.
    pub fn message(&self, handler: u8) -> (u64, Message) {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        (number, message(handler, number))
    }

    pub fn for_topic(&self) -> Message {
        message(0, UNFOLLOWED)
    }

    /// Notes what a party was told of a request.
    pub fn told(&self, number: u64, kernel: &str, told: Told) {
        match told {
            Told::Taken | Told::TakenForGood => &self.taken,
            Told::Unknown => &self.unknown,
            Told::Refused => {
                self.set(number, kernel, told);
                return;
            }
        }
        .fetch_add(1, Ordering::Relaxed);
        self.set(number, kernel, told);
    }

    fn set(&self, number: u64, kernel: &str, told: Told) {
        let mut entries = self.entries.lock().unwrap();
        let entry = entries.entry(number).or_insert_with(|| Entry {
            told,
            kernel: kernel.to_owned(),
            seen: Vec::new(),
        });
        entry.told = told;
        kernel.clone_into(&mut entry.kernel);
    }

    /// Notes that a reply was received.
    pub fn received(&self, payload: &[u8], by: &str) {
        self.received.fetch_add(1, Ordering::Relaxed);
        self.seen(payload, by);
    }

    /// Notes where a message was seen.
    pub fn seen(&self, payload: &[u8], place: &str) {
        let number = match payload.len() {
            16 => &payload[8..],
            8 => payload,
            _ => return,
        };
        let number = u64::from_le_bytes(number.try_into().unwrap());
        if number & UNFOLLOWED != 0 {
            return;
        }
        // It may be seen before the sender has noted what it was told.
        let mut entries = self.entries.lock().unwrap();
        let entry = entries.entry(number).or_insert_with(|| Entry {
            told: Told::Unknown,
            kernel: String::new(),
            seen: Vec::new(),
        });
        entry.seen.push(place.to_owned());
    }

    /// Messages that were seen too often, and those that were taken and not seen.
    pub fn faults(&self) -> [Vec<String>; 2] {
        let entries = self.entries.lock().unwrap();
        let mut faults = [Vec::new(), Vec::new()];
        for (number, entry) in &*entries {
            let most = usize::from(entry.told != Told::Refused);
            if entry.seen.len() > most {
                faults[0].push(format!("{number}: {entry:?}"));
            }
            if entry.told == Told::Taken && entry.seen.is_empty() {
                faults[1].push(format!("{number}: {entry:?}"));
            }
        }
        faults
    }
}

fn message(handler: u8, number: u64) -> Message {
    let mut message = [0; 16];
    message[0] = handler;
    message[8..].copy_from_slice(&number.to_le_bytes());
    message
}
