//! Condemned templates, as the supervisor records them.
//!
//! A removal condemns a template for as long as its connection to the control socket is open. A template is condemned
//! when the server has confirmed that lookups and opens fail, and no earlier server can reply any more. The list is in
//! the ledger, so that each later server starts with it.

use std::time::{Duration, Instant};

use stencilfs::control::{CondemnedRow, Response};
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;

use crate::condemned::GRACE;
use crate::supervisor::Supervisor;

/// A removal that sends no request for this long is stuck: its template is shown again, and the removal starts over at
/// its next request. A removal learns of the death of its supervisor at its next request; its template stays condemned
/// until then.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug)]
struct Row {
    digest: Digest,
    removed: bool,
    /// The caller; `None` for a caller of an earlier supervisor.
    holder: Option<u64>,
    until: Instant,
}

#[derive(Debug)]
struct Waiting {
    caller: u64,
    ring: u32,
    /// Templates whose backings are closed after that ring has been heard.
    removed: Vec<Digest>,
}

/// Condemned templates, and callers that wait until the server has applied the list.
#[derive(Debug, Default)]
pub struct Condemned {
    rows: Vec<Row>,
    waiting: Vec<Waiting>,
    /// PID of the server that has applied the list, number of the ring that it heard, and its grace time in
    /// milliseconds.
    acted: Option<(u32, u32, u64)>,
}

impl Condemned {
    /// Restores the list of the previous supervisor.
    pub fn restore(rows: Vec<CondemnedRow>) -> Condemned {
        let until = Instant::now() + HOLDER_TIMEOUT;
        let row = |row: CondemnedRow| Row { digest: row.digest, removed: row.removed, holder: None, until };
        Condemned { rows: rows.into_iter().map(row).collect(), ..Condemned::default() }
    }

    /// Returns the rows for the ledger.
    pub fn rows(&self) -> Vec<CondemnedRow> {
        self.rows.iter().map(|row| CondemnedRow { digest: row.digest, removed: row.removed }).collect()
    }

    /// Returns true while the caller has condemned at least one template.
    fn holds_any(&self, caller: u64) -> bool {
        self.rows.iter().any(|row| row.holder == Some(caller))
    }

    fn position(&self, caller: u64, digest: &Digest) -> Option<usize> {
        self.rows.iter().position(|row| row.holder == Some(caller) && row.digest == *digest)
    }
}

impl Supervisor {
    /// Condemns templates; the reply is sent when they can no longer be looked up or opened.
    pub(crate) fn condemn(&mut self, caller: u64, digests: &[Digest]) {
        let until = Instant::now() + HOLDER_TIMEOUT;
        let rows = &mut self.condemned.rows;
        for &digest in digests {
            // Removes the row of an earlier removal of the same template that lost its supervisor.
            rows.retain(|row| row.digest != digest || row.removed || row.holder.is_some_and(|h| h != caller));
            rows.push(Row { digest, removed: false, holder: Some(caller), until });
        }
        self.callers.keep(caller, self.condemned.holds_any(caller));
        self.ring(caller, Vec::new());
    }

    /// Checks that the caller has condemned all these templates without a break.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) with the name of the first template that is not
    /// condemned.
    pub(crate) fn confirm(&mut self, caller: u64, digests: &[Digest]) -> Result<()> {
        for digest in digests {
            let Some(at) = self.condemned.position(caller, digest) else {
                return Err(Error::try_again(format!("template {digest} is no longer condemned")));
            };
            self.condemned.rows[at].until = Instant::now() + HOLDER_TIMEOUT;
        }
        Ok(())
    }

    /// Releases templates; the reply is sent when they can be looked up again or, if they are removed, when their
    /// backings are closed.
    pub(crate) fn release(&mut self, caller: u64, digests: &[Digest], removed: bool) {
        let is_released = |row: &Row| row.holder == Some(caller) && digests.contains(&row.digest);
        if removed {
            let mut ours = Vec::new();
            for row in self.condemned.rows.iter_mut().filter(|row| is_released(row)) {
                row.removed = true;
                ours.push(row.digest);
            }
            return self.ring(caller, ours);
        }
        self.condemned.rows.retain(|row| !is_released(row));
        self.callers.keep(caller, self.condemned.holds_any(caller));
        self.ring(caller, Vec::new());
    }

    /// Makes the server read the list and check the store; the caller gets its reply afterwards.
    pub(crate) fn ring(&mut self, caller: u64, removed: Vec<Digest>) {
        let ring = self.ring_bell();
        self.condemned.waiting.push(Waiting { caller, ring, removed });
    }

    fn ring_bell(&mut self) -> u32 {
        // The ledger first: the server reads it when it hears the bell, and so does a server that starts from here on.
        self.save();
        self.state.stats.page().ring()
    }

    /// Records that the server has applied the list.
    pub(crate) fn acted(&mut self, ring: u32, grace_ms: u64) {
        self.condemned.acted = self.server.as_ref().map(|server| (server.row.process.pid, ring, grace_ms));
    }

    /// Returns the grace time in milliseconds if every server that can reply to the kernel has applied the list of that
    /// ring: it has reported so, or it was started later.
    fn applied(&self, ring: u32) -> Option<u64> {
        // A killed server may be in the middle of a reply, and a candidate may have read an earlier list.
        if self.candidate.is_some() || !self.leaving.is_empty() {
            return None;
        }
        let heard = |at: u32| at.wrapping_sub(ring) < u32::MAX / 2;
        let full = GRACE.as_millis() as u64;
        let Some(server) = &self.server else { return Some(full) };
        match self.condemned.acted {
            Some((pid, at, grace_ms)) if pid == server.row.process.pid && heard(at) => Some(grace_ms),
            _ => server.rings_at_start.is_some_and(heard).then_some(full),
        }
    }

    /// Releases the templates of callers that have disconnected, and replies to callers whose requests are executed.
    pub(crate) fn update_condemned(&mut self) {
        let (now, callers, waiting) = (Instant::now(), &self.callers, &self.condemned.waiting);
        let connected = |caller| callers.channel(caller).is_some();
        let waits = |row: &Row| waiting.iter().any(|one| Some(one.caller) == row.holder);
        let holds = |row: &mut Row| (now < row.until || waits(row)) && row.holder.is_none_or(connected);
        let gone: Vec<Row> = self.condemned.rows.extract_if(.., |row| !holds(row)).collect();
        self.condemned.waiting.retain(|waiting| callers.channel(waiting.caller).is_some());
        let removed: Vec<Digest> = gone.iter().filter(|row| row.removed).map(|row| row.digest).collect();
        self.close_backings_of(&removed);
        if !gone.is_empty() {
            self.ring_bell();
        }
        for waiting in std::mem::take(&mut self.condemned.waiting) {
            let Some(milliseconds) = self.applied(waiting.ring) else {
                self.condemned.waiting.push(waiting);
                continue;
            };
            let Waiting { caller, removed, .. } = waiting;
            if removed.is_empty() {
                // The timeout begins with the reply.
                let until = Instant::now() + HOLDER_TIMEOUT;
                let rows = self.condemned.rows.iter_mut();
                rows.filter(|row| row.holder == Some(caller)).for_each(|row| row.until = until);
                self.callers.reply(caller, Ok((Response::Settled { milliseconds }, None)));
                continue;
            }
            // The server no longer uses the backings, so they can be closed. The names are free for another import.
            self.close_backings_of(&removed);
            let is_removed = |row: &Row| row.holder == Some(caller) && removed.contains(&row.digest);
            self.condemned.rows.retain(|row| !is_removed(row));
            self.callers.keep(caller, self.condemned.holds_any(caller));
            self.ring(caller, Vec::new());
        }
    }

    fn close_backings_of(&mut self, digests: &[Digest]) {
        let keys: Vec<_> = digests.iter().flat_map(|digest| self.backings.keys_of(digest)).collect();
        if keys.is_empty() {
            return;
        }
        self.notify.forget_backings(&self.backings, &keys);
        // The files are closed by a child, as the file system may take long to release their space.
        self.to_close.extend(self.backings.close_with_files(&self.state.fuse, &keys));
        self.save();
    }
}
