//! Replies that are sent later: an open that waits for its backing, a READ that waits for the store.

use stencilfs::control::Phase;

use crate::server::in_flight::Flight;
use crate::server::refusal::Refusal;

/// How an open file is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// By this server, which answers the READs.
    Decode,
    /// By the kernel, from the backing with this id on the FUSE connection.
    Backing(u32),
}

/// Sends the reply to an OPEN. If it is dropped instead, the open fails with EIO.
pub type OpenReply = Box<dyn FnOnce(Result<Opened, Refusal>) + Send>;

/// Sends the reply to a READ.
pub type ReadReply = Box<dyn FnOnce(Result<&[u8], Refusal>) + Send>;

/// An open that was not answered yet.
pub struct PendingOpen {
    reply: OpenReply,
    flight: Flight,
}

impl std::fmt::Debug for PendingOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PendingOpen").field(self.flight.request()).finish()
    }
}

impl PendingOpen {
    /// Creates a pending open from its reply and its entry in the in-flight table.
    pub fn new(reply: OpenReply, flight: Flight) -> PendingOpen {
        PendingOpen { reply, flight }
    }

    /// Parks the open until its backing is registered. Returns false if the in-flight table is full: then the open must
    /// be answered now.
    pub fn park(&mut self) -> bool {
        self.flight.park(Phase::Parked)
    }

    /// Sends the reply.
    pub fn reply(self, result: Result<Opened, Refusal>) {
        self.flight.replying();
        (self.reply)(result);
    }
}
