//! Removal of templates: condemn, confirm, release.
//!
//! A removal condemns templates for as long as its connection to the control socket lives. A template is condemned once no
//! server can look it up or open it: the current server has the list in force, and no older server can answer any more.
//! The list is part of the mount state, so each later server starts with it.

use std::time::{Duration, Instant};

use stencilfs::control::CondemnedRow;
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;

use crate::supervisor::event::{CallerId, ServerId};

/// A removal that is silent for this long has stalled: its templates can be looked up again, and its next request fails.
/// Templates of a removal that a dead supervisor took stay condemned for this long.
pub const STALL_LIMIT: Duration = Duration::from_secs(15);

/// Delay until an open that was answered is visible in its process, if the server does not tell.
pub const MAX_GRACE: Duration = Duration::from_millis(200);

#[derive(Debug)]
struct Row {
    digest: Digest,
    removed: bool,
    /// The caller; unknown for a removal that an earlier supervisor took.
    holder: Option<CallerId>,
    until: Instant,
}

#[derive(Debug)]
struct Waiting {
    caller: CallerId,
    ring: u32,
    /// The backings of these templates are closed next.
    removed: Vec<Digest>,
}

/// Which servers can answer the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Answering {
    /// A killed server may be in the middle of a reply, or a candidate may have read an older list.
    pub others: bool,
    /// The current server, and the count of rings at its start.
    pub current: Option<(ServerId, Option<u32>)>,
}

/// What a caller that waited for a ring gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// The list is in force; opens that were answered before are visible in their processes after these milliseconds.
    Respond(CallerId, u64),
    /// No server uses the backings of these removed templates; the caller waits for another ring.
    CloseBackings(CallerId, Vec<Digest>),
}

/// Condemned templates, and callers that wait until the list is in force.
#[derive(Debug, Default)]
pub struct Removal {
    rows: Vec<Row>,
    waiting: Vec<Waiting>,
    /// The server that has a list in force, the count of rings when it read the list, and its grace in milliseconds.
    in_force: Option<(ServerId, u32, u64)>,
}

impl Removal {
    /// The list of an earlier supervisor.
    pub fn restore(rows: &[CondemnedRow], now: Instant) -> Removal {
        let until = now + STALL_LIMIT;
        let row = |row: &CondemnedRow| Row { digest: row.digest, removed: row.removed, holder: None, until };
        Removal { rows: rows.iter().map(row).collect(), ..Removal::default() }
    }

    /// The list, for the mount state.
    pub fn rows(&self) -> Vec<CondemnedRow> {
        self.rows.iter().map(|row| CondemnedRow { digest: row.digest, removed: row.removed }).collect()
    }

    /// True while the caller has condemned at least one template.
    pub fn has_holder(&self, caller: CallerId) -> bool {
        self.rows.iter().any(|row| row.holder == Some(caller))
    }

    /// Condemns templates for a caller.
    pub fn condemn(&mut self, caller: CallerId, digests: &[Digest], now: Instant) {
        for &digest in digests {
            // A removal of the same template whose supervisor died is over.
            let stays =
                |row: &Row| row.digest != digest || row.removed || row.holder.is_some_and(|h| h != caller);
            self.rows.retain(stays);
            self.rows.push(Row { digest, removed: false, holder: Some(caller), until: now + STALL_LIMIT });
        }
    }

    /// Checks that the caller's templates have been condemned without a gap.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) for a template that is no longer condemned.
    pub fn confirm(&mut self, caller: CallerId, digests: &[Digest], now: Instant) -> Result<()> {
        for digest in digests {
            let row = self.rows.iter_mut().find(|row| row.holder == Some(caller) && row.digest == *digest);
            let row =
                row.ok_or_else(|| Error::try_again(format!("template {digest} is no longer condemned")))?;
            row.until = now + STALL_LIMIT;
        }
        Ok(())
    }

    /// Releases templates of a caller: they can be looked up again.
    pub fn release(&mut self, caller: CallerId, digests: &[Digest]) {
        self.rows.retain(|row| row.holder != Some(caller) || !digests.contains(&row.digest));
    }

    /// Notes that templates of a caller are deleted from the store, and returns those.
    pub fn mark_removed(&mut self, caller: CallerId, digests: &[Digest]) -> Vec<Digest> {
        let ours = |row: &&mut Row| row.holder == Some(caller) && digests.contains(&row.digest);
        let mark = |row: &mut Row| {
            row.removed = true;
            row.digest
        };
        self.rows.iter_mut().filter(ours).map(mark).collect()
    }

    /// The caller waits until each server that can answer has read the list after that ring.
    pub fn wait(&mut self, caller: CallerId, ring: u32, removed: Vec<Digest>) {
        self.waiting.push(Waiting { caller, ring, removed });
    }

    /// A server has the list in force that it read after that ring.
    pub fn note_in_force(&mut self, server: ServerId, ring: u32, grace_ms: u64) {
        self.in_force = Some((server, ring, grace_ms));
    }

    /// A caller is gone, and with it its removals. Returns templates that were deleted already, and whether the list
    /// has changed.
    pub fn caller_gone(&mut self, caller: CallerId) -> (Vec<Digest>, bool) {
        self.waiting.retain(|waiting| waiting.caller != caller);
        self.drop_rows(|row| row.holder == Some(caller))
    }

    /// Drops the rows of stalled removals; returns as [`caller_gone`](Self::caller_gone).
    pub fn expire(&mut self, now: Instant) -> (Vec<Digest>, bool) {
        let waiting: Vec<CallerId> = self.waiting.iter().map(|one| one.caller).collect();
        self.drop_rows(|row| now >= row.until && !row.holder.is_some_and(|h| waiting.contains(&h)))
    }

    /// When the next row may expire.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.rows.iter().map(|row| row.until).min()
    }

    fn drop_rows(&mut self, mut gone: impl FnMut(&Row) -> bool) -> (Vec<Digest>, bool) {
        let dropped: Vec<Row> = self.rows.extract_if(.., |row| gone(row)).collect();
        let removed = dropped.iter().filter(|row| row.removed).map(|row| row.digest).collect();
        (removed, !dropped.is_empty())
    }

    /// Takes out the callers whose ring each server that can answer has heard.
    pub fn settled(&mut self, answering: Answering, now: Instant) -> Vec<Settled> {
        let mut settled = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            let Some(grace_ms) = self.grace_after(waiting.ring, answering) else {
                self.waiting.push(waiting);
                continue;
            };
            let Waiting { caller, removed, .. } = waiting;
            if removed.is_empty() {
                // The stall limit begins with the reply.
                let rows = self.rows.iter_mut().filter(|row| row.holder == Some(caller));
                rows.for_each(|row| row.until = now + STALL_LIMIT);
                settled.push(Settled::Respond(caller, grace_ms));
            } else {
                self.release(caller, &removed);
                settled.push(Settled::CloseBackings(caller, removed));
            }
        }
        settled
    }

    /// The grace in milliseconds, if each server that can answer has read the list after that ring, or started after it.
    fn grace_after(&self, ring: u32, answering: Answering) -> Option<u64> {
        if answering.others {
            return None;
        }
        // The count of rings wraps.
        let heard = |at: u32| at.wrapping_sub(ring) < u32::MAX / 2;
        let full = u64::try_from(MAX_GRACE.as_millis()).unwrap_or(u64::MAX);
        let Some((current, born)) = answering.current else { return Some(full) };
        match self.in_force {
            Some((server, at, grace_ms)) if server == current && heard(at) => Some(grace_ms),
            _ => born.is_some_and(heard).then_some(full),
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

    fn one(server: ServerId, born: u32) -> Answering {
        Answering { others: false, current: Some((server, Some(born))) }
    }

    #[test]
    fn a_caller_waits_until_the_server_has_its_ring_in_force() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a")], now);
        removal.wait(RM, 5, Vec::new());
        assert_eq!(removal.settled(one(SERVER, 4), now), []);
        removal.note_in_force(SERVER, 4, 3);
        assert_eq!(removal.settled(one(SERVER, 4), now), [], "an older list");
        removal.note_in_force(ServerId(6), 5, 3);
        assert_eq!(removal.settled(one(SERVER, 4), now), [], "another server");
        removal.note_in_force(SERVER, 5, 3);
        let blocked = Answering { others: true, ..one(SERVER, 4) };
        assert_eq!(removal.settled(blocked, now), [], "a killed server may still answer");
        assert_eq!(removal.settled(one(SERVER, 4), now), [Settled::Respond(RM, 3)]);
        assert_eq!(removal.settled(one(SERVER, 4), now), [], "one reply");
    }

    #[test]
    fn a_server_that_started_after_the_ring_has_read_it_and_so_has_none() {
        let now = Instant::now();
        for answering in [one(SERVER, 5), one(SERVER, 6), Answering { others: false, current: None }] {
            let mut removal = Removal::default();
            removal.condemn(RM, &[digest("a")], now);
            removal.wait(RM, 5, Vec::new());
            assert_eq!(removal.settled(answering, now), [Settled::Respond(RM, 200)], "{answering:?}");
        }
        let mut removal = Removal::default();
        removal.wait(RM, 2, Vec::new());
        assert_eq!(removal.settled(one(SERVER, u32::MAX - 1), now), [], "the count of rings has wrapped");
        removal.note_in_force(SERVER, 2, 0);
        assert_eq!(removal.settled(one(SERVER, u32::MAX - 1), now), [Settled::Respond(RM, 0)]);
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
        let later = now + STALL_LIMIT / 2;
        removal.confirm(RM, &[digest("a")], later).unwrap();
        assert_eq!(removal.expire(now + STALL_LIMIT), (Vec::new(), true), "b and c have stalled");
        assert!(removal.confirm(RM, &[digest("b")], later).is_err());
        assert!(removal.confirm(RM, &[digest("a")], later).is_ok());
        assert_eq!(removal.expire(later), (Vec::new(), false));
    }

    #[test]
    fn a_removal_that_waits_for_a_server_does_not_stall() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a")], now);
        removal.wait(RM, 1, Vec::new());
        let late = now + STALL_LIMIT * 3;
        assert_eq!(removal.expire(late), (Vec::new(), false));
        removal.note_in_force(SERVER, 1, 0);
        assert_eq!(removal.settled(one(SERVER, 0), late), [Settled::Respond(RM, 0)]);
        assert_eq!(removal.expire(late), (Vec::new(), false), "the limit begins with the reply");
        assert_eq!(removal.expire(late + STALL_LIMIT), (Vec::new(), true));
    }

    #[test]
    fn backings_of_removed_templates_are_closed_when_the_server_has_let_go_of_them() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a"), digest("b")], now);
        assert_eq!(removal.mark_removed(RM, &[digest("a"), digest("x")]), [digest("a")]);
        removal.wait(RM, 1, vec![digest("a")]);
        assert_eq!(removal.settled(one(SERVER, 0), now), []);
        removal.note_in_force(SERVER, 1, 0);
        assert_eq!(removal.settled(one(SERVER, 0), now), [Settled::CloseBackings(RM, vec![digest("a")])]);
        assert_eq!(removal.rows(), [CondemnedRow { digest: digest("b"), removed: false }]);
        assert!(removal.has_holder(RM));
        removal.release(RM, &[digest("b")]);
        assert!(!removal.has_holder(RM));
    }

    #[test]
    fn a_caller_that_is_gone_holds_nothing() {
        let now = Instant::now();
        let mut removal = Removal::default();
        removal.condemn(RM, &[digest("a"), digest("b")], now);
        removal.condemn(GC, &[digest("c")], now);
        removal.mark_removed(RM, &[digest("b")]);
        removal.wait(RM, 1, Vec::new());
        assert_eq!(removal.caller_gone(RM), (vec![digest("b")], true));
        assert_eq!(removal.caller_gone(RM), (Vec::new(), false));
        assert_eq!(removal.rows().len(), 1);
        assert_eq!(removal.settled(one(SERVER, 1), now), [], "it waits for nothing");
    }

    #[test]
    fn templates_of_an_earlier_supervisor_stay_condemned_until_they_stall_or_are_condemned_again() {
        let now = Instant::now();
        let row = |text: &str, removed| CondemnedRow { digest: digest(text), removed };
        let rows = [row("a", false), row("b", true)];
        let mut removal = Removal::restore(&rows, now);
        assert_eq!(removal.rows(), rows);
        assert!(removal.confirm(RM, &[digest("a")], now).is_err(), "its caller knows another supervisor");
        removal.condemn(RM, &[digest("a")], now);
        assert_eq!(removal.rows().len(), 2);
        assert_eq!(removal.next_expiry(), Some(now + STALL_LIMIT));
        assert_eq!(removal.expire(now + STALL_LIMIT), (vec![digest("b")], true));
    }
}
