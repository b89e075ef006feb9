//! Requests of servers: handshake, backings, condemned templates.

use std::os::fd::OwnedFd;

use stencilfs::control::{BackingKind, CONTROL_VERSION, FileKey, OnDamage};
use stencilfs::error::{Error, Result};
use stencilfs::units::Bytes;

use super::backings::{Frozen, Registration, Reservation};
use super::lifecycle::{Admission, ServerState};
use super::{Machine, Purpose};
use crate::protocol::{MAX_KEYS, ServerReply, ServerRequest};
use crate::supervisor::event::{Action, ServerId, Task};

impl Machine {
    pub(super) fn message(
        &mut self,
        id: ServerId,
        number: u64,
        request: ServerRequest,
        file: Option<OwnedFd>,
    ) {
        let is_candidate = self.handover.get_mut(id).is_some();
        let Some(server) = self.server_mut(id) else { return };
        match server.admit(number) {
            Admission::New => {}
            Admission::Repeated => return,
            Admission::OutOfTurn => {
                log::error!("the server sends requests without waiting for replies");
                return self.end_server(id, "the new server does not wait for replies");
            }
        }
        let reply = match request {
            ServerRequest::Handshake { control_version, version, lacks, init_reply } => {
                self.handshake(id, number, (control_version, version, lacks), init_reply, file)
            }
            ServerRequest::GiveUp { failure } => {
                match self.handover.get_mut(id) {
                    Some(candidate) => candidate.failure = Some(failure),
                    None => self.lifecycle.cannot_start(failure),
                }
                Some(Ok(ServerReply::Done))
            }
            ServerRequest::Serving if is_candidate => {
                self.actions.push(Action::done(id, number));
                return self.promote_candidate();
            }
            ServerRequest::Serving => {
                self.lifecycle.serves();
                self.announce();
                Some(Ok(ServerReply::Done))
            }
            _ if is_candidate => Some(Err(Error::failed("the server does not serve yet"))),
            request => self.serving_request(id, number, request),
        };
        if let Some(reply) = reply {
            self.actions.push(Action::reply(id, number, reply, None));
        }
    }

    fn server_mut(&mut self, id: ServerId) -> Option<&mut ServerState> {
        match self.lifecycle.get_mut(id) {
            Some(server) => Some(server),
            None => self.handover.get_mut(id).map(|candidate| &mut candidate.server),
        }
    }

    /// Handles a request of the current server. Returns `None` if a job or the kernel determines the reply.
    fn serving_request(
        &mut self,
        id: ServerId,
        number: u64,
        request: ServerRequest,
    ) -> Option<Result<ServerReply>> {
        match request {
            ServerRequest::Reserve { key, size, data_bytes } => {
                self.reserve(id, number, key, Bytes::new(size), Bytes::new(data_bytes))
            }
            ServerRequest::Freeze { key } => self.freeze(id, number, key),
            ServerRequest::Evict { keys } => self.evict(id, number, keys),
            ServerRequest::Register { key, identity, verified_at } => match self
                .backings
                .registration(&key, identity)
            {
                Ok(Registration::Register) => {
                    self.backings.note_verified(&key, verified_at);
                    self.actions.push(Action::RegisterBacking(id, number, key));
                    None
                }
                Ok(Registration::AlreadyRegistered(backing)) => Some(Ok(ServerReply::Registered(backing))),
                Err(error) => Some(Err(error)),
            },
            ServerRequest::Scrubbed { key, at, damage } => self.scrubbed(id, number, &key, at, damage),
            ServerRequest::NoBacking { key, reason } => {
                let noted = self.backings.note_reason(key, reason);
                self.actions.push(Action::Save);
                Some(noted.map(|()| ServerReply::Done))
            }
            ServerRequest::Abandon { key } => {
                self.shutdown.close_later(self.backings.abandon(&key));
                Some(Ok(ServerReply::Done))
            }
            ServerRequest::Progress { key, bytes } => {
                self.backings.note_progress(&key, bytes);
                Some(Ok(ServerReply::Done))
            }
            ServerRequest::Condemned { ring, grace_ms } => {
                self.removal.note_in_force(id, ring, grace_ms);
                Some(Ok(ServerReply::Done))
            }
            ServerRequest::StopReader { thread, key, offset, arrived } => {
                if self.mount.options.on_damage != OnDamage::Eio {
                    self.actions.push(Action::StopReader { thread, key, offset, arrived });
                }
                Some(Ok(ServerReply::Done))
            }
            ServerRequest::Handshake { .. } | ServerRequest::GiveUp { .. } | ServerRequest::Serving => None,
        }
    }

    /// Handles a handshake. The first INIT reply is sent to the kernel; later ones must be equal, because the kernel
    /// accepts only one.
    fn handshake(
        &mut self,
        id: ServerId,
        number: u64,
        (control_version, version, lacks): (u32, String, Vec<String>),
        init_reply: Vec<u8>,
        table: Option<OwnedFd>,
    ) -> Option<Result<ServerReply>> {
        if control_version != CONTROL_VERSION {
            return Some(Err(Error::failed(format!(
                "the server uses control version {control_version}, expected {CONTROL_VERSION}"
            ))));
        }
        if self.mount.init_reply.as_ref().is_some_and(|first| *first != init_reply) {
            return Some(Err(Error::failed(
                "the server requests other FUSE features than the first server of the mount",
            )
            .hint("unmount, then mount again with the new version")));
        }
        let row = (version, lacks);
        if let Some(candidate) = self.handover.get_mut(id) {
            (candidate.server.row.version, candidate.server.row.lacks) = row;
            candidate.table = table;
            if self.mount.init_reply.is_some() {
                return Some(Ok(ServerReply::Done));
            }
        } else if let Some(server) = self.lifecycle.get_mut(id) {
            (server.row.version, server.row.lacks) = row;
            self.actions.push(Action::Watch(table));
        }
        // The reply is saved before it is sent, since a supervisor that takes over must not accept a different reply.
        // The saved reply may never have been sent, so the reply of each current server is sent.
        let is_first = self.mount.init_reply.replace(init_reply.clone()).is_none();
        self.actions.extend([Action::Save, Action::WriteInitReply { id, number, init_reply, is_first }]);
        None
    }

    pub(super) fn init_reply_written(
        &mut self,
        id: ServerId,
        number: u64,
        is_first: bool,
        result: std::io::Result<()>,
    ) {
        let reply = match result {
            Ok(()) => Ok(ServerReply::Done),
            // ENOENT: the kernel has received a reply to this request before.
            Err(e) if !is_first && e.raw_os_error() == Some(libc::ENOENT) => Ok(ServerReply::Done),
            Err(e) => Err(Error::failed("the kernel rejects the INIT reply").because(e)),
        };
        if is_first && reply.is_err() {
            self.mount.init_reply = None;
            self.actions.push(Action::Save);
        }
        self.actions.push(Action::reply(id, number, reply, None));
    }

    fn reserve(
        &mut self,
        id: ServerId,
        number: u64,
        key: FileKey,
        size: Bytes,
        data: Bytes,
    ) -> Option<Result<ServerReply>> {
        match self.backings.reserve(&self.mount.chosen, &key, data) {
            Ok(Reservation::Create) => {
                self.request_job(id, Purpose::Create(id, number, key), Task::CreateBacking { size, data })
            }
            Ok(Reservation::Ready(backing)) => match self.backings.copy(&key) {
                Ok(file) => {
                    let reply = Ok(ServerReply::Registered(backing));
                    self.actions.push(Action::reply(id, number, reply, Some(file)));
                    None
                }
                Err(error) => Some(Err(error)),
            },
            Ok(Reservation::Evict(keys)) => Some(Ok(ServerReply::Evict(keys))),
            Err(error) => Some(Err(error)),
        }
    }

    fn freeze(&mut self, id: ServerId, number: u64, key: FileKey) -> Option<Result<ServerReply>> {
        match self.backings.reserved_for_freeze(&key) {
            Ok(Some(reserved)) => {
                let task = Task::FreezeBacking { key: key.clone(), reserved };
                self.request_job(id, Purpose::Freeze(id, number, key), task)
            }
            Ok(None) => match self.backings.frozen(&key, None) {
                Ok(Frozen { file, verified_at }) => {
                    let reply = Ok(ServerReply::Frozen { verified_at });
                    self.actions.push(Action::reply(id, number, reply, Some(file)));
                    None
                }
                Err(error) => Some(Err(error)),
            },
            Err(error) => Some(Err(error)),
        }
    }

    fn evict(&mut self, id: ServerId, number: u64, mut keys: Vec<FileKey>) -> Option<Result<ServerReply>> {
        if self.handover.has_candidate() {
            // The candidate has read a mount state with these backings: none may be closed before the candidate serves.
            return Some(Ok(ServerReply::Evicted(Vec::new())));
        }
        keys.truncate(MAX_KEYS);
        self.request_job(id, Purpose::FindUnused(id, number, keys.clone()), Task::FindUnused(keys))
    }

    /// Enters the result of a scrub. The reply to a report of damage follows when the store has forgotten the
    /// verification. A scrub without damage does not renew the verification that the store remembers: pages that clones
    /// map were not read from the disk.
    fn scrubbed(
        &mut self,
        id: ServerId,
        number: u64,
        key: &FileKey,
        at: u64,
        damage: Option<String>,
    ) -> Option<Result<ServerReply>> {
        if self.handover.has_candidate() {
            // The candidate has read a mount state in which the backing is not damaged.
            return Some(Err(Error::try_again("another server is starting")));
        }
        let is_damaged = damage.is_some();
        match damage {
            None => self.backings.note_verified(key, Some(at)),
            Some(reason) => self.backings.withdraw(key, &reason),
        }
        self.actions.push(Action::Save);
        match is_damaged {
            true => self.request_job(id, Purpose::Scrubbed(id, number), Task::Remember(key.clone(), None)),
            false => Some(Ok(ServerReply::Done)),
        }
    }

    fn request_job(&mut self, id: ServerId, purpose: Purpose, task: Task) -> Option<Result<ServerReply>> {
        if let Some(server) = self.lifecycle.get_mut(id) {
            server.start_job();
        }
        self.job(purpose, task);
        None
    }

    pub(super) fn backing_registered(
        &mut self,
        id: ServerId,
        number: u64,
        key: &FileKey,
        result: std::io::Result<u32>,
    ) {
        let reply = match result {
            Ok(backing) => {
                self.backings.note_registered(key, backing);
                if let Some(verified) = self.backings.verified(key) {
                    self.job(Purpose::Remember, Task::Remember(key.clone(), Some(verified)));
                }
                self.actions.extend([Action::Save, Action::StoreBackings]);
                Ok(ServerReply::Registered(backing))
            }
            Err(e) => {
                let stacked = e.raw_os_error() == Some(libc::ELOOP);
                let error = Error::failed("the kernel rejects the backing").because(e);
                Err(match (stacked, self.mount.chosen.kind) {
                    (true, BackingKind::Copy) => {
                        error.hint("use --cache-dir with a directory on ext4 or xfs")
                    }
                    (true, BackingKind::Kernel) => error.hint("mount with --serve auto"),
                    (false, _) => error,
                })
            }
        };
        self.actions.push(Action::reply(id, number, reply, None));
    }
}
