//! An open that waits for its backing, and the one unsafe call of the daemon.

use fuser::{FileHandle, FopenFlags, ReplyOpen};

use crate::errno::Refusal;

/// An OPEN that is not answered yet. Dropped unanswered, it fails with EIO.
#[derive(Debug)]
pub struct Opening(ReplyOpen);

impl Opening {
    /// Takes the reply along.
    pub fn new(reply: ReplyOpen) -> Opening {
        Opening(reply)
    }

    /// Answers with the backing of that id, which the supervisor keeps open on this connection.
    #[allow(unsafe_code)]
    pub fn passthrough(self, id: u32) {
        // SAFETY: the id was registered on this connection by the supervisor, and stays so while it is handed out. The
        // wrapper never closes it: it is taken apart again below.
        let backing = unsafe { self.0.wrap_backing(id) };
        self.0.opened_passthrough(FileHandle(0), FopenFlags::empty(), &backing);
        let _ = backing.into_raw();
    }

    /// Answers with an error.
    pub fn refuse(self, refusal: Refusal) {
        self.0.error(refusal.errno());
    }
}
