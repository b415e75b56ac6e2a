//! Sending again what could not be delivered.

use super::calls::CALL_BIT;
use super::handle::KernelHandle;
use super::send::{Address, SendOptions, write_bytes};
use crate::error::{ReplayError, TrySendError};
use crate::kernel::DeadLetter;
use crate::message::RAW_KIND;

impl KernelHandle {
    /// Sends a request again that could not be delivered, to this kernel, whichever it was for: under the same type, priority,
    /// deadline, trace id and correlation (but a call's, which is no more), with a timestamp of its own if it had one. Does not wait for room.
    ///
    /// # Errors
    /// [`ReplayError`]; nothing has been sent then.
    pub fn replay(&self, letter: &DeadLetter) -> Result<(), ReplayError> {
        if letter.is_reply {
            return Err(ReplayError::NotARequest);
        }
        let Some(header) = &letter.header else {
            return Err(ReplayError::Incomplete);
        };
        if letter.is_cut() {
            return Err(ReplayError::Incomplete);
        }
        let kind = match letter.type_id {
            _ if header.kind() == RAW_KIND => RAW_KIND,
            Some(type_id) => self
                .instance
                .types
                .kind_of(type_id)
                .map_err(TrySendError::from)?,
            None => return Err(ReplayError::Incomplete),
        };
        let extension = letter.extension.unwrap_or_default();
        let options = SendOptions {
            correlation: match header.correlation() {
                call if call & CALL_BIT != 0 => 0,
                own => own,
            },
            priority: header.priority(),
            timestamp: extension.timestamp_ns != 0,
            deadline_ns: Some(extension.deadline_ns).filter(|deadline| *deadline != 0),
            trace_id: Some(extension.trace_id).filter(|id| *id != [0; 16]),
            ..SendOptions::default()
        };
        let address = Address::with(kind, &options).map_err(TrySendError::from)?;
        self.send_once(&address, |body| write_bytes(&letter.payload, body))?;
        Ok(())
    }
}
