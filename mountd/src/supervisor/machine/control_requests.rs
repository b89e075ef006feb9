//! Requests of callers of the control socket: queries, removals, restarts, unmounts.

use std::os::fd::OwnedFd;

use stencilfs::control::{FileKey, MAX_INODES, Request, Response};
use stencilfs::error::Error;
use stencilfs::store::Digest;

use super::Machine;
use super::removal::{Answering, Settled};
use crate::supervisor::event::{Action, CallerId, Inputs};

impl Machine {
    pub(super) fn request(
        &mut self,
        caller: CallerId,
        request: Request,
        program: Option<OwnedFd>,
        inputs: &Inputs,
    ) {
        match request {
            Request::Snapshot => self.actions.push(Action::RespondState(caller)),
            Request::Backing { index } => {
                let (response, file) = match self.backings.copy_at(index) {
                    Ok(file) => (Ok(Response::Descriptor), Some(file)),
                    Err(error) => (Err(error), None),
                };
                self.actions.push(Action::Respond(caller, response, file));
            }
            Request::Inodes { numbers } if numbers.len() > MAX_INODES => {
                self.respond(
                    Some(caller),
                    Err(Error::usage(format!("more than {MAX_INODES} inode numbers"))),
                );
            }
            Request::Inodes { numbers } => self.actions.push(Action::RespondInodes(caller, numbers)),
            Request::Condemn { digests } => {
                self.removal.condemn(caller, &digests, inputs.now);
                self.keep(caller);
                self.ring(Some((caller, Vec::new())));
            }
            Request::Confirm { digests } => {
                let confirmed = self.removal.confirm(caller, &digests, inputs.now);
                self.respond(Some(caller), confirmed);
            }
            Request::Release { digests, removed: true } => {
                let removed = self.removal.mark_removed(caller, &digests);
                self.ring(Some((caller, removed)));
            }
            Request::Release { digests, removed: false } => {
                self.removal.release(caller, &digests);
                self.keep(caller);
                self.ring(Some((caller, Vec::new())));
            }
            Request::Refresh => self.ring(Some((caller, Vec::new()))),
            Request::Unmount { mode } => self.unmount(Some(caller), mode),
            Request::Restart { supervisor } => {
                if let Err(error) = self.restart(caller, supervisor, program) {
                    self.respond(Some(caller), Err(error));
                }
            }
        }
    }

    fn keep(&mut self, caller: CallerId) {
        self.actions.push(Action::KeepCaller(caller, self.removal.has_holder(caller)));
    }

    // Removal.

    /// Increments the ring: the server reads the list of condemned templates and closes its open files of the store.
    /// The caller in `waiting`, if any, gets its response when the server has done so.
    fn ring(&mut self, waiting: Option<(CallerId, Vec<Digest>)>) {
        // The current server reads the ledger when the ring changes. A later server reads the ledger at its start.
        self.actions.extend([Action::Save, Action::Ring]);
        self.rings = self.rings.wrapping_add(1);
        if let Some((caller, removed)) = waiting {
            self.removal.wait(caller, self.rings, removed);
        }
    }

    /// Handles the result of dropping the rows of callers that are gone or have stalled: increments the ring if the
    /// list has changed. The backings of templates that are already removed are closed when the server has dropped
    /// them.
    pub(super) fn rows_dropped(&mut self, (removed, changed): (Vec<Digest>, bool)) {
        if changed || !removed.is_empty() {
            self.ring(None);
        }
        if !removed.is_empty() {
            self.removal.close_after(self.rings, removed);
        }
    }

    pub(super) fn settle(&mut self, inputs: &Inputs) {
        let current = self.lifecycle.current().map(|server| (server.id, server.rings_at_start));
        let others = self.handover.has_candidate() || self.lifecycle.has_leaving();
        for settled in self.removal.settled(Answering { others, current }, inputs.now) {
            match settled {
                Settled::Respond(caller, milliseconds) => {
                    self.actions.push(Action::Respond(caller, Ok(Response::Settled { milliseconds }), None));
                }
                Settled::CloseBackings(caller, removed) => {
                    // From here on the same image may be imported again.
                    self.close_backings_of(&removed);
                    if let Some(caller) = caller {
                        self.keep(caller);
                    }
                    self.ring(caller.map(|caller| (caller, Vec::new())));
                }
            }
        }
    }

    fn close_backings_of(&mut self, digests: &[Digest]) {
        digests.iter().for_each(|digest| self.backings.forget_reasons(digest));
        let keys: Vec<FileKey> = digests.iter().flat_map(|digest| self.backings.keys_of(digest)).collect();
        if !keys.is_empty() {
            self.close_backings(&keys);
            self.actions.push(Action::Save);
        }
    }

    pub(super) fn close_backings(&mut self, keys: &[FileKey]) {
        let (ids, files) = self.backings.close(keys);
        if !ids.is_empty() {
            self.actions.extend([Action::ForgetBackings(ids.clone()), Action::CloseBackings(ids)]);
        }
        self.shutdown.close_later(files);
    }
}
