//! An open that waits for its backing, and the one unsafe call of the daemon.

use fuser::{FileHandle, FopenFlags, ReplyOpen};

use stencilfs::control::Phase;

use crate::server::in_flight::Flight;
use crate::server::refusal::Refusal;

/// An OPEN that is not answered yet. Dropped unanswered, it fails with EIO.
#[derive(Debug)]
pub struct Opening {
    reply: ReplyOpen,
    flight: Flight,
}

impl Opening {
    /// Takes the reply along.
    pub fn new(reply: ReplyOpen, flight: Flight) -> Opening {
        Opening { reply, flight }
    }

    /// Lets it wait. False where so many wait already that it must be answered now.
    pub fn park(&mut self) -> bool {
        self.flight.park(Phase::Parked)
    }

    /// Answers with the backing of that id, which the supervisor keeps open on this connection.
    #[allow(unsafe_code)]
    pub fn passthrough(self, id: u32) {
        self.flight.replying();
        // SAFETY: the id was registered on this connection by the supervisor, and stays so while it is handed out. The
        // wrapper never closes it: it is taken apart again below.
        let backing = unsafe { self.reply.wrap_backing(id) };
        self.reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), &backing);
        let _ = backing.into_raw();
    }

    /// Answers with an error.
    pub fn refuse(self, refusal: Refusal) {
        self.flight.replying();
        self.reply.error(refusal.errno());
    }
}
