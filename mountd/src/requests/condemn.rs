//! Templates that are about to be removed, as the supervisor keeps them.
//!
//! A removal condemns a template for as long as its connection to the control socket lives. Condemned means: the server has
//! said that nobody finds or opens it, and no older server can answer any more. The list is in the ledger, so every later
//! server begins with it.

use std::time::{Duration, Instant};

use stencilfs::control::{CondemnedRow, Response};
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;

use crate::condemned::GRACE;
use crate::supervisor::Supervisor;

/// A removal that is not heard of for so long stands still: its template is found again, and it begins anew when it asks.
/// One whose supervisor died finds that out at its next question; until then its template stays condemned.
const LONGEST_SILENCE: Duration = Duration::from_secs(15);

#[derive(Debug)]
struct Row {
    digest: Digest,
    removed: bool,
    /// The caller; of an earlier supervisor it is not known.
    holder: Option<u64>,
    until: Instant,
}

#[derive(Debug)]
struct Waiting {
    caller: u64,
    ring: u32,
    /// The backings of these templates are then closed.
    removed: Vec<Digest>,
}

/// What is condemned, and who waits to hear that it is.
#[derive(Debug, Default)]
pub struct Condemned {
    rows: Vec<Row>,
    waiting: Vec<Waiting>,
    /// Number of the server that has acted upon the list, of the ring that it heard, and the grace that it asks for.
    acted: Option<(u32, u32, u64)>,
}

impl Condemned {
    /// Those of the supervisor before.
    pub fn restore(rows: Vec<CondemnedRow>) -> Condemned {
        let until = Instant::now() + LONGEST_SILENCE;
        let row = |row: CondemnedRow| Row { digest: row.digest, removed: row.removed, holder: None, until };
        Condemned { rows: rows.into_iter().map(row).collect(), ..Condemned::default() }
    }

    /// For the ledger.
    pub fn rows(&self) -> Vec<CondemnedRow> {
        self.rows.iter().map(|row| CondemnedRow { digest: row.digest, removed: row.removed }).collect()
    }

    /// True while the caller with this number has condemned at least one template.
    fn holds_any(&self, caller: u64) -> bool {
        self.rows.iter().any(|row| row.holder == Some(caller))
    }

    fn position(&self, caller: u64, digest: &Digest) -> Option<usize> {
        self.rows.iter().position(|row| row.holder == Some(caller) && row.digest == *digest)
    }
}

impl Supervisor {
    /// Answers when nobody can find or open the templates.
    pub(crate) fn condemn(&mut self, caller: u64, digests: &[Digest]) {
        let until = Instant::now() + LONGEST_SILENCE;
        let rows = &mut self.condemned.rows;
        for &digest in digests {
            // An earlier removal of the same template, which lost its supervisor, is over.
            rows.retain(|row| row.digest != digest || row.removed || row.holder.is_some_and(|h| h != caller));
            rows.push(Row { digest, removed: false, holder: Some(caller), until });
        }
        self.callers.keep(caller, self.condemned.holds_any(caller));
        self.ring(caller, Vec::new());
    }

    /// Fails unless the caller has condemned all these templates, and nobody could open one of them since.
    ///
    /// # Errors
    /// [`Code::TryAgain`](stencilfs::error::Code::TryAgain) that names the first template which is not condemned.
    pub(crate) fn confirm(&mut self, caller: u64, digests: &[Digest]) -> Result<()> {
        for digest in digests {
            let Some(at) = self.condemned.position(caller, digest) else {
                return Err(Error::try_again(format!("template {digest} is not condemned any more")));
            };
            self.condemned.rows[at].until = Instant::now() + LONGEST_SILENCE;
        }
        Ok(())
    }

    /// Answers when the templates can be found again, or, if they are removed, nothing of them is left here.
    pub(crate) fn release(&mut self, caller: u64, digests: &[Digest], removed: bool) {
        let is_meant = |row: &Row| row.holder == Some(caller) && digests.contains(&row.digest);
        if removed {
            let mut ours = Vec::new();
            for row in self.condemned.rows.iter_mut().filter(|row| is_meant(row)) {
                row.removed = true;
                ours.push(row.digest);
            }
            return self.ring(caller, ours);
        }
        self.condemned.rows.retain(|row| !is_meant(row));
        self.callers.keep(caller, self.condemned.holds_any(caller));
        self.ring(caller, Vec::new());
    }

    /// Has the server look at the list, and at the store.
    pub(crate) fn ring(&mut self, caller: u64, removed: Vec<Digest>) {
        let ring = self.ring_bell();
        self.condemned.waiting.push(Waiting { caller, ring, removed });
    }

    fn ring_bell(&mut self) -> u32 {
        // A server that hears the bell reads the ledger, and one that starts from here on reads it too.
        self.save();
        self.kept.stats.page().ring()
    }

    /// The server has acted upon the list.
    pub(crate) fn acted(&mut self, ring: u32, grace_ms: u64) {
        self.condemned.acted = self.server.as_ref().map(|server| (server.row.process.pid, ring, grace_ms));
    }

    /// True when every server that can answer the kernel knows what was written down before that ring: it has said so, or
    /// it began later. Gives the grace in milliseconds.
    fn known(&self, ring: u32) -> Option<u64> {
        // One that was killed may be in the middle of an answer, one that begins may have read an older list.
        if self.candidate.is_some() || !self.leaving.is_empty() {
            return None;
        }
        let heard = |at: u32| at.wrapping_sub(ring) < u32::MAX / 2;
        let full = GRACE.as_millis() as u64;
        let Some(server) = &self.server else { return Some(full) };
        match self.condemned.acted {
            Some((pid, at, grace_ms)) if pid == server.row.process.pid && heard(at) => Some(grace_ms),
            _ => server.born.is_some_and(heard).then_some(full),
        }
    }

    /// Lets go what belongs to callers that have gone, and answers those whose wish is fulfilled.
    pub(crate) fn see_to_condemned(&mut self) {
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
            let Some(milliseconds) = self.known(waiting.ring) else {
                self.condemned.waiting.push(waiting);
                continue;
            };
            let Waiting { caller, removed, .. } = waiting;
            if removed.is_empty() {
                // The silence begins with the answer.
                let until = Instant::now() + LONGEST_SILENCE;
                let rows = self.condemned.rows.iter_mut();
                rows.filter(|row| row.holder == Some(caller)).for_each(|row| row.until = until);
                self.callers.say(caller, Ok((Response::Settled { milliseconds }, None)));
                continue;
            }
            // The server no longer uses the backings, so they can be closed. Another import may use the names.
            self.close_backings_of(&removed);
            let is_meant = |row: &Row| row.holder == Some(caller) && removed.contains(&row.digest);
            self.condemned.rows.retain(|row| !is_meant(row));
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
        // To give back their room may take the filesystem a while.
        self.to_close.extend(self.backings.close_with_files(&self.kept.fuse, &keys));
        self.save();
    }
}
