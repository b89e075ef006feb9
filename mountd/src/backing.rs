//! An open that waits for its backing, and the only unsafe call of the daemon.

use fuser::{FileHandle, FopenFlags, ReplyOpen};

use stencilfs::control::Phase;

use crate::errno::Refusal;
use crate::inflight::Flight;

/// A pending OPEN. It fails with EIO if it is dropped without a reply.
#[derive(Debug)]
pub struct Opening {
    reply: ReplyOpen,
    flight: Flight,
}

impl Opening {
    /// Creates a pending open from the reply object and the table entry of the request.
    pub fn new(reply: ReplyOpen, flight: Flight) -> Opening {
        Opening { reply, flight }
    }

    /// Parks the open until its backing is ready. Returns false if the table is full: the open must be answered now.
    pub fn park(&mut self) -> bool {
        self.flight.park(Phase::Parked)
    }

    /// Replies with a backing that the supervisor keeps registered on this connection.
    #[allow(unsafe_code)]
    pub fn passthrough(self, id: u32) {
        self.flight.replying();
        // SAFETY: the supervisor registered the id on this connection and keeps it registered while backings with that
        // id are served. The wrapper never closes the id: `into_raw` below takes it apart again.
        let backing = unsafe { self.reply.wrap_backing(id) };
        self.reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), &backing);
        let _ = backing.into_raw();
    }

    /// Replies with an error.
    pub fn refuse(self, refusal: Refusal) {
        self.flight.replying();
        self.reply.error(refusal.errno());
    }
}
