//! READs of damaged blocks, if the mount stops the processes that need such a block (`--on-damage`).
//!
//! Only the supervisor may signal other processes. The READ waits for the supervisor without a thread (unless all
//! parking slots are taken), so that other READs are answered even while no supervisor lives, and is then answered with
//! EIO.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use stencilfs::control::{FileKey, OnDamage, Phase, RequestInfo};
use stencilfs::error::Result;
use stencilfs::sys::process::threads;
use stencilfs::units::PAGE_SIZE;

use crate::protocol::ServerRequest;
use crate::protocol::link::Link;
use crate::server::in_flight::Flight;
use crate::server::pending::ReadReply;
use crate::server::refusal::Refusal;

/// A READ of a damaged block.
struct DamagedRead {
    flight: Flight,
    key: FileKey,
    refusal: Refusal,
    /// Time since boot.
    arrived: Duration,
    reply: ReadReply,
}

impl DamagedRead {
    /// Makes the supervisor stop the process, then sends the reply. If the supervisor cannot be reached, the reply is
    /// sent all the same.
    fn finish(self, link: &Link) {
        let DamagedRead { flight, key, refusal, arrived, reply } = self;
        let RequestInfo { thread, offset, .. } = *flight.request();
        let request = ServerRequest::StopReader { thread, key: key.clone(), offset, arrived };
        if let Err(error) = link.request_done(&request) {
            log::error!(
                template:% = key.digest, file = key.file;
                "template {} file {} offset {offset}: the process of thread {thread} was not signalled: {error}; \
                 the READ fails with EIO: end the clones of this template",
                key.digest,
                key.file
            );
        }
        flight.replying();
        reply(Err(refusal));
    }
}

/// READs of damaged blocks that wait for the supervisor. Bounded by the number of parking slots in the in-flight table.
pub struct DamagedReads {
    link: Arc<Link>,
    queue: Sender<DamagedRead>,
}

impl std::fmt::Debug for DamagedReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DamagedReads")
    }
}

impl DamagedReads {
    /// Starts the thread that waits for the supervisor. Returns `None` if READs of damaged blocks only fail.
    ///
    /// # Errors
    /// Returns an error if the system refuses the thread.
    pub fn start(on_damage: OnDamage, link: Arc<Link>) -> Result<Option<DamagedReads>> {
        if on_damage == OnDamage::Eio {
            return Ok(None);
        }
        let (queue, reads) = channel::<DamagedRead>();
        let ours = Arc::clone(&link);
        threads::start(move || reads.into_iter().for_each(|read| read.finish(&ours)))?;
        Ok(Some(DamagedReads { link, queue }))
    }

    /// Returns true if the process of this READ is stopped. After a failed readahead the kernel sends a separate READ
    /// for each page that a process needs. A longer READ is a readahead, whose process may need another page of the
    /// range, or a direct read, whose process sees the EIO.
    pub fn includes(request: &RequestInfo) -> bool {
        request.thread != 0 && u64::from(request.size) <= PAGE_SIZE
    }

    /// Stops the process of a READ, then answers the READ with EIO.
    pub fn refuse(&self, mut flight: Flight, key: FileKey, refusal: Refusal, reply: ReadReply) {
        let arrived = flight.arrived();
        let is_parked = flight.park(Phase::Parked);
        let read = DamagedRead { flight, key, refusal, arrived, reply };
        // All parking slots are taken: wait in this thread.
        let unqueued = if is_parked { self.queue.send(read).err().map(|error| error.0) } else { Some(read) };
        if let Some(read) = unqueued {
            read.finish(&self.link);
        }
    }
}
