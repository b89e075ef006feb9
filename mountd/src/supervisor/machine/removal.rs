//! Removal of templates: condemn, confirm, release.
//!
//! A removal condemns templates for as long as its connection to the control socket exists. The removal may proceed
//! when no server can answer a lookup or open of the template with success any more: when the current server applies
//! the list of condemned templates, and no older server can send replies. The list is part of the mount state, so each
//! later server starts with the list.

use std::time::{Duration, Instant};

use stencilfs::control::CondemnedRow;
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;

use crate::supervisor::event::{CallerId, ServerId};

/// A removal that sends no request for this long has stalled: its templates can be looked up again, and its next
/// request fails. After a takeover, templates that were condemned before the takeover stay condemned for this long.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Delay until an answered open is visible in `/proc` of its process, if the server has not reported a shorter delay.
pub const MAX_GRACE: Duration = Duration::from_millis(200);

/// A condemned template.
#[derive(Debug)]
struct Row {
    digest: Digest,
    removed: bool,
    /// The caller that condemned the template; `None` if the caller has closed the connection, or was connected to an
    /// earlier supervisor.
    holder: Option<CallerId>,
    /// Time at which the removal counts as stalled.
    until: Instant,
}

/// A wait until all servers apply the list as of a ring.
#[derive(Debug)]
struct Waiting {
    /// The caller that waits; `None` for removed templates whose caller is gone.
    caller: Option<CallerId>,
    ring: u32,
    /// Removed templates, whose backings are closed after the wait.
    removed: Vec<Digest>,
}

/// The servers that may send replies to the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Answering {
    /// True if there is a leaving server, which may be sending a reply, or a candidate, which may have read an older
    /// list.
    pub others: bool,
    /// The current server, and the count of rings when it was started, if known.
    pub current: Option<(ServerId, Option<u32>)>,
}

/// The next step for a caller whose wait for a ring is over.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// Respond: all servers apply the list. Opens that were answered before are visible in `/proc` after this many
    /// milliseconds.
    Respond(CallerId, u64),
    /// Close the backings of these removed templates, which no server uses. The caller, if it is still connected, then
    /// waits for another ring.
    CloseBackings(Option<CallerId>, Vec<Digest>),
}

/// The list of condemned templates, and the callers that wait until all servers apply it.
#[derive(Debug, Default)]
pub struct Removal {
    rows: Vec<Row>,
    waiting: Vec<Waiting>,
    /// The server that last reported that it applies a list, the count of rings before it read the list, and its grace
    /// time in milliseconds.
    in_force: Option<(ServerId, u32, u64)>,
}

impl Removal {
    /// Restores the list of an earlier supervisor.
    pub fn restore(rows: &[CondemnedRow], now: Instant) -> Removal {
        let until = now + STALL_TIMEOUT;
        let row = |row: &CondemnedRow| Row { digest: row.digest, removed: row.removed, holder: None, until };
        Removal { rows: rows.iter().map(row).collect(), ..Removal::default() }
    }

    /// Returns the list, for the mount state.
    pub fn rows(&self) -> Vec<CondemnedRow> {
        self.rows.iter().map(|row| CondemnedRow { digest: row.digest, removed: row.removed }).collect()
    }

    /// Returns true if at least one template is condemned for the caller.
    pub fn has_holder(&self, caller: CallerId) -> bool {
        self.rows.iter().any(|row| row.holder == Some(caller))
    }

    /// Condemns templates for a caller.
    pub fn condemn(&mut self, caller: CallerId, digests: &[Digest], now: Instant) {
        for &digest in digests {
            // A row without a holder is from a removal that lost its supervisor; this removal replaces it.
            let stays =
                |row: &Row| row.digest != digest || row.removed || row.holder.is_some_and(|h| h != caller);
            self.rows.retain(stays);
            self.rows.push(Row { digest, removed: false, holder: Some(caller), until: now + STALL_TIMEOUT });
        }
    }

    /// Checks that the templates have been condemned for the caller without interruption, and restarts the stall
    /// timeout.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) for a template that is no longer condemned.
    pub fn confirm(&mut self, caller: CallerId, digests: &[Digest], now: Instant) -> Result<()> {
        for digest in digests {
            let row = self.rows.iter_mut().find(|row| row.holder == Some(caller) && row.digest == *digest);
            let row =
                row.ok_or_else(|| Error::try_again(format!("template {digest} is no longer condemned")))?;
            row.until = now + STALL_TIMEOUT;
        }
        Ok(())
    }

    /// Releases templates of a caller. They can be looked up again, unless another caller has condemned them.
    pub fn release(&mut self, caller: CallerId, digests: &[Digest]) {
        self.rows.retain(|row| row.holder != Some(caller) || !digests.contains(&row.digest));
    }

    /// Records that templates are deleted from the store. Returns those that are condemned for the caller.
    pub fn mark_removed(&mut self, caller: CallerId, digests: &[Digest]) -> Vec<Digest> {
        let ours = |row: &&mut Row| row.holder == Some(caller) && digests.contains(&row.digest);
        let mark = |row: &mut Row| {
            row.removed = true;
            row.digest
        };
        self.rows.iter_mut().filter(ours).map(mark).collect()
    }

    /// Makes the caller wait until every server that may send replies applies the list as of ring `ring`; then the
    /// backings of `removed` are closed.
    pub fn wait(&mut self, caller: CallerId, ring: u32, removed: Vec<Digest>) {
        self.waiting.push(Waiting { caller: Some(caller), ring, removed });
    }

    /// Same as [`wait`](Self::wait) for removed templates whose caller is gone.
    pub fn close_after(&mut self, ring: u32, removed: Vec<Digest>) {
        self.waiting.push(Waiting { caller: None, ring, removed });
    }

    /// Records the report of a server that it applies the list which it read after the ring number `ring`.
    pub fn note_in_force(&mut self, server: ServerId, ring: u32, grace_ms: u64) {
        self.in_force = Some((server, ring, grace_ms));
    }

    /// Drops the rows of a caller whose connection is closed, except those of templates that are already deleted from
    /// the store: these are returned, and remain until the server has dropped their backings. Also returns whether the
    /// list has changed.
    pub fn caller_gone(&mut self, caller: CallerId) -> (Vec<Digest>, bool) {
        self.waiting.retain(|waiting| waiting.caller != Some(caller));
        self.drop_rows(|row| row.holder == Some(caller))
    }

    /// Drops the rows of removals whose time limit has passed. Returns the same as [`caller_gone`](Self::caller_gone).
    pub fn expire(&mut self, now: Instant) -> (Vec<Digest>, bool) {
        let stalled: Vec<bool> =
            self.rows.iter().map(|row| now >= row.until && !self.is_awaited(row)).collect();
        let mut stalled = stalled.into_iter();
        self.drop_rows(|_| stalled.next().unwrap_or(false))
    }

    /// Returns the earliest time at which the hold on a condemned template may expire.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.rows.iter().filter(|row| !self.is_awaited(row)).map(|row| row.until).min()
    }

    /// Returns true if the row remains until the servers apply the list.
    fn is_awaited(&self, row: &Row) -> bool {
        self.waiting.iter().any(|waiting| {
            waiting.caller == row.holder && (row.holder.is_some() || waiting.removed.contains(&row.digest))
        })
    }

    fn drop_rows(&mut self, mut gone: impl FnMut(&Row) -> bool) -> (Vec<Digest>, bool) {
        let mut removed = Vec::new();
        let before = self.rows.len();
        self.rows.retain_mut(|row| {
            let is_gone = gone(row);
            if is_gone && row.removed {
                row.holder = None;
                removed.push(row.digest);
            }
            !is_gone || row.removed
        });
        let changed = self.rows.len() < before;
        (removed, changed)
    }

    /// Ends the waits that are over, and returns the next steps.
    pub fn settled(&mut self, answering: Answering, now: Instant) -> Vec<Settled> {
        let mut settled = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            let Some(grace_ms) = self.grace_after(waiting.ring, answering) else {
                self.waiting.push(waiting);
                continue;
            };
            let Waiting { caller, removed, .. } = waiting;
            match caller {
                Some(caller) if removed.is_empty() => {
                    // The stall timeout starts with the response.
                    let rows = self.rows.iter_mut().filter(|row| row.holder == Some(caller));
                    rows.for_each(|row| row.until = now + STALL_TIMEOUT);
                    settled.push(Settled::Respond(caller, grace_ms));
                }
                caller => {
                    self.rows
                        .retain(|row| !row.removed || row.holder != caller || !removed.contains(&row.digest));
                    settled.push(Settled::CloseBackings(caller, removed));
                }
            }
        }
        settled
    }

    /// Returns the grace time in milliseconds if all servers that may send replies have read the list after the ring
    /// number `ring`; otherwise `None`.
    fn grace_after(&self, ring: u32, answering: Answering) -> Option<u64> {
        if answering.others {
            return None;
        }
        // The count of rings wraps around.
        let includes_ring = |at: u32| at.wrapping_sub(ring) < u32::MAX / 2;
        let full = u64::try_from(MAX_GRACE.as_millis()).unwrap_or(u64::MAX);
        let Some((current, at_start)) = answering.current else { return Some(full) };
        match self.in_force {
            Some((server, at, grace_ms)) if server == current && includes_ring(at) => Some(grace_ms),
            _ => at_start.is_some_and(includes_ring).then_some(full),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RM: CallerId = CallerId(1);
    const GC: CallerId = CallerId(2);
    const SERVER: ServerId = ServerId(7);

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    fn only(server: ServerId, rings_at_start: u32) -> Answering {
        Answering { others: false, current: Some((server, Some(rings_at_start))) }
    }

    #[test]
    fn a_caller_waits_until_the_server_applies_the_list() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a")], now);
        removal.wait(RM, 5, Vec::new());
        assert_eq!(removal.settled(only(SERVER, 4), now), []);
        removal.note_in_force(SERVER, 4, 3);
        assert_eq!(removal.settled(only(SERVER, 4), now), [], "an older list");
        removal.note_in_force(ServerId(6), 5, 3);
        assert_eq!(removal.settled(only(SERVER, 4), now), [], "another server");
        removal.note_in_force(SERVER, 5, 3);
        let blocked = Answering { others: true, ..only(SERVER, 4) };
        assert_eq!(removal.settled(blocked, now), [], "a killed server may still answer");
        assert_eq!(removal.settled(only(SERVER, 4), now), [Settled::Respond(RM, 3)]);
        assert_eq!(removal.settled(only(SERVER, 4), now), [], "one response");
    }

    #[test]
    fn a_caller_does_not_wait_for_a_server_that_started_after_the_ring() {
        let now = Instant::now();
        for answering in [only(SERVER, 5), only(SERVER, 6), Answering { others: false, current: None }] {
            let mut removal = Removal::default();
            removal.condemn(RM, &[digest("a")], now);
            removal.wait(RM, 5, Vec::new());
            assert_eq!(removal.settled(answering, now), [Settled::Respond(RM, 200)], "{answering:?}");
        }
        let mut removal = Removal::default();
        removal.wait(RM, 2, Vec::new());
        assert_eq!(removal.settled(only(SERVER, u32::MAX - 1), now), [], "the count of rings has wrapped");
        removal.note_in_force(SERVER, 2, 0);
        assert_eq!(removal.settled(only(SERVER, u32::MAX - 1), now), [Settled::Respond(RM, 0)]);
    }

    #[test]
    fn confirm_fails_for_templates_of_others_and_after_a_stall() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a"), digest("b")], now);
        removal.condemn(GC, &[digest("c")], now);
        assert!(removal.confirm(RM, &[digest("a"), digest("b")], now).is_ok());
        let error = removal.confirm(RM, &[digest("a"), digest("c")], now).unwrap_err();
        assert!(error.to_string().contains(&digest("c").to_string()), "{error}");
        let later = now + STALL_TIMEOUT / 2;
        removal.confirm(RM, &[digest("a")], later).unwrap();
        assert_eq!(removal.expire(now + STALL_TIMEOUT), (Vec::new(), true), "b and c have stalled");
        assert!(removal.confirm(RM, &[digest("b")], later).is_err());
        assert!(removal.confirm(RM, &[digest("a")], later).is_ok());
        assert_eq!(removal.expire(later), (Vec::new(), false));
    }

    #[test]
    fn a_removal_does_not_stall_while_it_waits_for_a_server() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a")], now);
        removal.wait(RM, 1, Vec::new());
        let late = now + STALL_TIMEOUT * 3;
        assert_eq!(removal.expire(late), (Vec::new(), false));
        removal.note_in_force(SERVER, 1, 0);
        assert_eq!(removal.settled(only(SERVER, 0), late), [Settled::Respond(RM, 0)]);
        assert_eq!(removal.expire(late), (Vec::new(), false), "the timeout starts with the response");
        assert_eq!(removal.expire(late + STALL_TIMEOUT), (Vec::new(), true));
    }

    #[test]
    fn backings_of_removed_templates_are_closed_when_the_server_has_dropped_them() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a"), digest("b")], now);
        assert_eq!(removal.mark_removed(RM, &[digest("a"), digest("x")]), [digest("a")]);
        removal.wait(RM, 1, vec![digest("a")]);
        assert_eq!(removal.settled(only(SERVER, 0), now), []);
        removal.note_in_force(SERVER, 1, 0);
        assert_eq!(
            removal.settled(only(SERVER, 0), now),
            [Settled::CloseBackings(Some(RM), vec![digest("a")])]
        );
        assert_eq!(removal.rows(), [CondemnedRow { digest: digest("b"), removed: false }]);
        assert!(removal.has_holder(RM));
        removal.release(RM, &[digest("b")]);
        assert!(!removal.has_holder(RM));
    }

    #[test]
    fn a_disconnected_caller_condemns_no_templates() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a"), digest("b")], now);
        removal.condemn(GC, &[digest("c")], now);
        removal.mark_removed(RM, &[digest("b")]);
        removal.wait(RM, 1, Vec::new());
        assert_eq!(removal.caller_gone(RM), (vec![digest("b")], true));
        assert_eq!(removal.caller_gone(RM), (Vec::new(), false));
        let row = |text: &str, removed| CondemnedRow { digest: digest(text), removed };
        assert_eq!(removal.rows(), [row("b", true), row("c", false)], "b is deleted, and may have backings");
        assert_eq!(removal.settled(only(SERVER, 1), now), [], "the caller does not wait any more");
        removal.close_after(2, vec![digest("b")]);
        let late = now + STALL_TIMEOUT;
        assert_eq!(removal.next_expiry(), Some(late));
        assert_eq!(removal.expire(late), (Vec::new(), true), "c has stalled, b waits for the server");
        assert_eq!(removal.next_expiry(), None);
        assert_eq!(removal.settled(only(SERVER, 1), late), []);
        removal.note_in_force(SERVER, 2, 0);
        assert_eq!(removal.settled(only(SERVER, 1), late), [Settled::CloseBackings(None, vec![digest("b")])]);
        assert_eq!(removal.rows(), []);
    }

    #[test]
    fn restored_templates_stay_condemned_until_they_stall_or_are_condemned_again() {
        let now = Instant::now();
        let row = |text: &str, removed| CondemnedRow { digest: digest(text), removed };
        let rows = [row("a", false), row("b", true)];
        let mut removal = Removal::restore(&rows, now);
        assert_eq!(removal.rows(), rows);
        assert!(
            removal.confirm(RM, &[digest("a")], now).is_err(),
            "the caller is not connected to this supervisor"
        );
        removal.condemn(RM, &[digest("a")], now);
        assert_eq!(removal.rows().len(), 2);
        assert_eq!(removal.next_expiry(), Some(now + STALL_TIMEOUT));
        assert_eq!(removal.expire(now + STALL_TIMEOUT), (vec![digest("b")], true));
        assert_eq!(removal.rows(), [row("b", true)], "until the server has dropped its backings");
    }
}
