//! Memory of this process whose size a user decides: taken fallibly, and booked on a device.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::host_memory::{Account, HostPool};
use crate::error::Error;
use crate::message::AlignedBytes;
use crate::system;

/// A value whose memory is booked as long as it lives.
pub(crate) struct Booked<T> {
    value: T,
    bytes: u64,
    account: Arc<Account>,
}

impl HostPool {
    /// Room for a payload, as aligned as in a slot, every page of it present.
    pub(crate) fn payload(&self, bytes: usize) -> Result<Booked<AlignedBytes>, Error> {
        self.book(bytes as u64, || AlignedBytes::try_zeroed(bytes))
    }

    /// So many bytes of this value, every page of them present.
    pub(crate) fn bytes(&self, count: usize, value: u8) -> Result<Booked<Box<[u8]>>, Error> {
        self.book(count as u64, || {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(count).ok()?;
            bytes.resize(count, value);
            Some(bytes.into_boxed_slice())
        })
    }

    /// What `take` gives, booked; an error if it gives nothing.
    fn book<T>(&self, bytes: u64, take: impl FnOnce() -> Option<T>) -> Result<Booked<T>, Error> {
        let account = self.account();
        if !account.take(bytes) {
            return Err(self.refused(bytes));
        }
        let refused = |error| {
            account.give_back(bytes);
            error
        };
        // Until it is written to.
        let _grant =
            system::memory::ask(bytes).map_err(|left| refused(self.out_of_memory(bytes, left)))?;
        let Some(value) = take() else {
            return Err(refused(self.out_of_memory(bytes, 0)));
        };
        Ok(Booked {
            value,
            bytes,
            account: Arc::clone(account),
        })
    }
}

impl<T> fmt::Debug for Booked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Booked")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl<T> Deref for Booked<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Booked<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for Booked<T> {
    fn drop(&mut self) {
        self.account.give_back(self.bytes);
    }
}
