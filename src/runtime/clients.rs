//! From a handle to clients: who gets a lane, and where the lanes of a kernel meet.

use std::sync::{Arc, Weak};

use super::client::Client;
use super::client_lane::ClientLane;
use super::client_options::{Backpressure, ClientOptions};
use super::handle::KernelHandle;
use super::instance::KernelInstance;
use super::latest::Latest;
use super::port::KernelPort;
use super::receive::{Bytes, kind_of};
use crate::bridge::{Hub, Lane, LanePlan, Merger};
use crate::error::Error;
use crate::logging;
use crate::message::{RAW_KIND, RingMessage};
use crate::time::Deadline;

/// Where the lanes of a kernel meet, while it has clients.
pub(super) type LaneHub = Weak<Hub<KernelPort>>;

impl KernelHandle {
    /// A client of its own for one thread. As long as there are clients, and requests of theirs that have not been handled, the handle itself
    /// cannot send, receive, call or split. Takes the lane's memory; starts the device's bridge if nobody has.
    ///
    /// # Errors
    /// [`Error::UnknownType`] if the kernel was not registered for one of the types; [`Error::InvalidOption`];
    /// [`Error::EndpointsBusy`] if the kernel's sides are split off, in use by another thread, or awaited by a pending call, and if there are
    /// 255 clients already; [`Error::DeviceBusy`] if the bridge looks after 1024 kernels and connections already; [`Error::Os`] if its thread
    /// cannot be started; [`Error::OutOfMemory`]; [`Error::InvalidLifecycle`] once the runtime has stopped.
    pub fn client<Req: RingMessage, Resp: RingMessage>(&self) -> Result<Client<Req, Resp>, Error> {
        self.client_with(ClientOptions::default())
    }

    /// As [`client`](Self::client), with options.
    ///
    /// # Errors
    /// As `client`.
    pub fn client_with<Req: RingMessage, Resp: RingMessage>(
        &self,
        options: ClientOptions,
    ) -> Result<Client<Req, Resp>, Error> {
        let kind = self.declared_kind(Req::TYPE_ID, Req::NAME)?;
        self.declared_kind(Resp::TYPE_ID, Resp::NAME)?;
        let reply_kind = kind_of::<Resp>(&self.instance);
        Ok(Client::new(self.lane(options)?, kind, reply_kind))
    }

    /// As [`client`](Self::client), for raw bytes.
    ///
    /// # Errors
    /// As `client`.
    pub fn client_bytes(&self) -> Result<Client<Bytes, Bytes>, Error> {
        self.client_bytes_with(ClientOptions::default())
    }

    /// As [`client_bytes`](Self::client_bytes), with options.
    ///
    /// # Errors
    /// As `client`.
    pub fn client_bytes_with(&self, options: ClientOptions) -> Result<Client<Bytes, Bytes>, Error> {
        Ok(Client::new(self.lane(options)?, RAW_KIND, None))
    }

    /// An endpoint for values of which only the newest counts, a sensor's say: a client that never has to wait for room
    /// ([`Backpressure::DropOldest`]), and reads the newest reply.
    ///
    /// # Errors
    /// As [`client`](Self::client).
    pub fn latest<Req: RingMessage, Resp: RingMessage>(&self) -> Result<Latest<Req, Resp>, Error> {
        let options = ClientOptions {
            backpressure: Backpressure::DropOldest,
            ..ClientOptions::default()
        };
        Ok(Latest::new(self.client_with(options)?))
    }

    /// A client but for the types of its messages.
    pub(super) fn lane(&self, options: ClientOptions) -> Result<ClientLane, Error> {
        let instance = &self.instance;
        instance.check_here("make a client")?;
        let plan = LanePlan {
            capacity: options.checked_capacity()?,
            kernel: instance.ring,
            weight: options.weight,
            newest_only: options.newest_only(),
            priority: options.priority,
        };
        let _deferral = logging::defer();
        // Memory first: what comes then can only fail before anything has changed.
        let (ends, lane) = plan.build(&instance.bridge.pool)?;
        let mut hub = instance.clients.lock();
        let (found, number) = match self.join(&hub, lane, options.direct)? {
            Joined::Hub(found, number) => (found, number),
            Joined::None(lane) => {
                let (send, receive) = self.take_sides(self)?;
                let positions: Vec<_> = instance
                    .blocks
                    .iter()
                    .map(|block| block.control().processed())
                    .zip(send.positions())
                    .collect();
                let port = KernelPort::new(Arc::clone(instance), send, receive);
                // The kernel's sides go back with the port if this fails.
                let merger = Merger::new(
                    port,
                    instance.ring.capacity(),
                    &positions,
                    instance.signals.callers_park,
                    &instance.bridge.pool,
                )?;
                let attention = Arc::clone(&instance.bridge.attention);
                let new = Arc::new(Hub::new(merger, attention));
                // The kernel's sides go back with it if this fails.
                instance.bridge.add(Arc::<Hub<KernelPort>>::clone(&new))?;
                *hub = Arc::downgrade(&new);
                match self.join(&hub, lane, options.direct)? {
                    Joined::Hub(found, number) => (found, number),
                    Joined::None(_) => return Err(self.busy("there are 255 clients already")),
                }
            }
        };
        instance.lanes.add(number, Arc::clone(&ends.shared));
        let event = Arc::clone(&ends.shared.replied);
        instance.signals.lanes.add_client(event);
        Ok(ClientLane::new(
            Arc::clone(instance),
            found,
            number,
            ends,
            options,
        ))
    }

    /// Adds a lane to the hub that there is, if there is one that has not given the kernel back.
    fn join(&self, hub: &LaneHub, lane: Box<Lane>, direct: bool) -> Result<Joined, Error> {
        let Some(hub) = hub.upgrade() else {
            return Ok(Joined::None(lane));
        };
        let instance: &KernelInstance = &self.instance;
        let number = {
            let deadline = Deadline::after(instance.termination_timeout);
            let mut merger = hub
                .take_before(deadline)
                .ok_or_else(|| self.busy("another thread does not let go of the lanes"))?;
            if merger.is_over() {
                return Ok(Joined::None(lane));
            }
            hub.add(&mut merger, lane, direct)
                .ok_or_else(|| self.busy("there are 255 clients already"))?
        };
        Ok(Joined::Hub(hub, number))
    }
}

/// What came of a lane.
enum Joined {
    /// It is there, under this number.
    Hub(Arc<Hub<KernelPort>>, u16),
    /// There is no hub yet.
    None(Box<Lane>),
}
