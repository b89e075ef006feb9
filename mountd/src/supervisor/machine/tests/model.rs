//! A model of the environment of the machine: servers, jobs, the kernel's backings, processes with open files.
//!
//! The model executes actions, and panics if an action breaks an invariant of the machine.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use stencilfs::control::{CondemnedRow, Response};
use stencilfs::error::{Error, Result};
use stencilfs::store::{Digest, Proof};
use stencilfs::sys::process::{Ended, ProcessId};

use super::super::*;
use super::initial::initial;
use super::server_model::{Key, ServerModel};
use crate::protocol::{ServerReply, ServerRequest, fds};
use crate::supervisor::event::{JobResult, Started, Task};
use crate::supervisor::kernel_decode::Opened;

pub fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

pub fn process(pid: u32) -> ProcessId {
    ProcessId { pid, identity: u64::from(pid) }
}

/// Returns the name of an action.
pub fn name(action: &Action) -> String {
    let text = format!("{action:?}");
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

/// A job of the model.
#[derive(Debug)]
struct JobModel {
    id: JobId,
    name: String,
    frozen: Option<(u64, u64)>,
    keys: Vec<Key>,
}

/// The saved mount state: condemned templates, and registered backings with their ids.
type SavedState = (Vec<CondemnedRow>, Vec<(Key, u32)>);

pub struct World {
    pub machine: Machine,
    pub answers: u64,
    now: Instant,
    pub servers: BTreeMap<ServerId, ServerModel>,
    jobs: Vec<JobModel>,
    /// Registered backings: the file for each id.
    pub kernel: BTreeMap<u32, Key>,
    next_backing: u32,
    /// Identities of immutable files.
    pub frozen: HashSet<(u64, u64)>,
    /// Number of processes that have a file open with a backing.
    users: HashMap<Key, u32>,
    /// Number of opens of a template.
    pub opens: HashMap<Digest, u64>,
    /// The mount state that was saved last.
    saved: Option<SavedState>,
    replied: HashSet<(ServerId, u64)>,
    /// Number of requests of each caller without a response.
    pub pending_requests: HashMap<CallerId, u32>,
    pub responses: Vec<(CallerId, Result<Response>)>,
    pub exits: u64,
    pub dismissed: u64,
    pub log: Vec<String>,
    pub init_error: Option<i32>,
    pub backing_error: Option<i32>,
    pub start_error: bool,
    pub record_error: bool,
    pub gave_up: bool,
}

impl World {
    pub fn new() -> World {
        let inputs = Inputs { now: Instant::now(), wall: SystemTime::UNIX_EPOCH, answers: 0 };
        let (machine, _, actions) = Machine::new(initial(), &inputs);
        let mut world = World {
            machine,
            answers: 0,
            now: inputs.now,
            servers: BTreeMap::new(),
            jobs: Vec::new(),
            kernel: BTreeMap::new(),
            next_backing: 1,
            frozen: HashSet::new(),
            users: HashMap::new(),
            opens: HashMap::new(),
            saved: None,
            replied: HashSet::new(),
            pending_requests: HashMap::new(),
            responses: Vec::new(),
            exits: 0,
            dismissed: 0,
            log: Vec::new(),
            init_error: None,
            backing_error: None,
            start_error: false,
            record_error: false,
            gave_up: false,
        };
        world.execute(actions);
        world
    }

    pub fn inputs(&self) -> Inputs {
        Inputs { now: self.now, wall: SystemTime::UNIX_EPOCH, answers: self.answers }
    }

    /// Returns the number of executed actions whose text contains `word`.
    pub fn seen(&self, word: &str) -> usize {
        self.log.iter().filter(|line| line.contains(word)).count()
    }

    pub fn current(&self) -> ServerId {
        self.machine.current().expect("a current server").id
    }

    pub fn candidate(&self) -> Option<ServerId> {
        self.servers.iter().find(|(_, s)| s.is_candidate && !s.is_killed).map(|(id, _)| *id)
    }

    pub fn handshake(init_reply: &[u8]) -> ServerRequest {
        ServerRequest::Handshake {
            control_version: CONTROL_VERSION,
            version: "1".into(),
            lacks: Vec::new(),
            init_reply: init_reply.to_vec(),
        }
    }

    pub fn introduce_current(&mut self) {
        self.request(World::handshake(b"reply"));
        self.request(ServerRequest::Serving);
    }

    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.send(Event::Tick);
    }

    pub fn send(&mut self, event: Event) {
        if let Event::Request(caller, ..) = &event {
            *self.pending_requests.entry(*caller).or_default() += 1;
        }
        if let Event::CallerGone(caller) = &event {
            self.pending_requests.remove(caller);
        }
        if let Event::Exited(id) = &event {
            let was_killed = self.servers.get(id).is_some_and(|server| server.is_killed);
            if was_killed && self.servers.remove(id).is_some() {
                self.exits += 1;
            }
        }
        let actions = self.machine.handle(event, &self.inputs());
        self.execute(actions);
    }

    /// Makes a request of the current server. Returns the reply, if it was immediate.
    pub fn request(&mut self, request: ServerRequest) -> Option<ServerReply> {
        self.request_of(self.current(), request)
    }

    pub fn request_of(&mut self, id: ServerId, request: ServerRequest) -> Option<ServerReply> {
        let server = self.servers.get_mut(&id)?;
        server.last_number += 1;
        let number = server.last_number;
        server.pending = Some((number, request.clone()));
        let before = self.log.len();
        self.send(Event::Message(id, Numbered { number, body: request }, None));
        let replied = self.replied.contains(&(id, number));
        replied.then(|| self.last_reply(before)).flatten()
    }

    fn last_reply(&self, from: usize) -> Option<ServerReply> {
        let line = self.log[from..].iter().rev().find(|line| line.starts_with("Reply"))?;
        let (_, text) = line.split_once("json ")?;
        serde_json::from_str(text).ok()
    }

    /// Sends the pending request of a server again, as after the death of a supervisor.
    pub fn repeat(&mut self, id: ServerId) {
        if let Some((number, body)) = self.servers.get(&id).and_then(|server| server.pending.clone()) {
            self.send(Event::Message(id, Numbered { number, body }, None));
        }
    }

    /// Performs all steps of a hydration. Returns the id of the backing.
    pub fn hydrate(&mut self, key: Key) -> Option<u32> {
        for _ in 0..3 {
            let server = self.servers.get(&self.current())?;
            let frozen = server.filling.get(&key).is_some_and(|identity| self.frozen.contains(identity));
            let step = server.next_step(key, frozen);
            self.request(step);
            self.finish_jobs();
        }
        self.servers.get(&self.current())?.ready.get(&key).copied()
    }

    pub fn evict(&mut self, keys: &[Key]) {
        let id = self.current();
        let Some(server) = self.servers.get_mut(&id) else { return };
        let keys = server.withdraw(keys);
        self.request(ServerRequest::Evict { keys });
        self.finish_jobs();
    }

    /// Opens a file that has a backing. Returns false if the current server does not answer the open with the backing.
    pub fn open_passthrough(&mut self, key: Key) -> bool {
        let serving = self.machine.current().is_some_and(|server| server.row.serving);
        let Some(server) = self.machine.current().and_then(|current| self.servers.get(&current.id)) else {
            return false;
        };
        let Some(id) = server.ready.get(&key).filter(|_| serving && !server.refuses(key)) else {
            return false;
        };
        assert_eq!(self.kernel.get(id), Some(&key), "an open is answered with a closed backing");
        *self.users.entry(key).or_default() += 1;
        *self.opens.entry(key.digest()).or_default() += 1;
        true
    }

    /// Opens a file without a backing, if any server that may still send replies answers the open.
    pub fn open_decode(&mut self, key: Key) {
        if self.servers.values().any(|server| !server.refuses(key)) {
            *self.opens.entry(key.digest()).or_default() += 1;
        }
    }

    pub fn close_file(&mut self, key: Key) {
        if let Some(count) = self.users.get_mut(&key) {
            *count = count.saturating_sub(1);
        }
    }

    fn in_use(&self, key: Key) -> bool {
        self.users.get(&key).is_some_and(|count| *count > 0)
    }

    pub fn is_unused(&self, key: Key) -> bool {
        !self.in_use(key)
    }

    /// Makes the current server read the saved list of condemned templates and report that it applies the list.
    pub fn apply_condemned_list(&mut self) {
        let Some(id) = self.machine.current().map(|server| server.id) else { return };
        let Some(server) = self.servers.get_mut(&id).filter(|server| server.pending.is_none()) else {
            return;
        };
        let (rows, _) = self.saved.clone().unwrap_or_default();
        server.list = rows.iter().map(|row| row.digest).collect();
        let removed: Vec<Digest> = rows.iter().filter(|row| row.removed).map(|row| row.digest).collect();
        server.ready.retain(|key, _| !removed.contains(&key.digest()));
        let ring = self.machine.rings;
        self.request(ServerRequest::Condemned { ring, grace_ms: 0 });
    }

    pub fn finish_jobs(&mut self) {
        while !self.jobs.is_empty() {
            self.finish_job(|_| true);
        }
    }

    pub fn finish_job(&mut self, which: impl Fn(&str) -> bool) {
        let Some(at) = self.jobs.iter().position(|job| which(&job.name)) else { return };
        let job = self.jobs.remove(at);
        let result = match job.name.as_str() {
            "CreateBacking" => JobResult::Done(Some(file())),
            "FindUnused" => {
                let unused = (0..).zip(&job.keys).filter(|(_, key)| !self.in_use(**key));
                JobResult::Unused(unused.map(|(index, _)| index).collect())
            }
            // Each second backing is for kernel decode: another file takes the place of the image.
            "FreezeBacking" if job.id.0.is_multiple_of(2) => {
                let (file, proof) = (
                    file(),
                    Proof::of(&Digest::of(b"a"), "memory", &File::open("/dev/null").unwrap(), &[]).unwrap(),
                );
                self.frozen.insert(fds::identity(&file).unwrap());
                JobResult::Decoded(Opened {
                    file,
                    proof,
                    verified_at: job.id.0.is_multiple_of(4).then_some(1),
                })
            }
            _ => JobResult::Done(None),
        };
        self.frozen.extend(job.frozen);
        self.send(Event::JobEnded(job.id, result));
    }

    pub fn fail_jobs(&mut self) {
        for job in std::mem::take(&mut self.jobs) {
            self.send(Event::JobEnded(job.id, JobResult::Failed(Error::failed("the job failed"))));
        }
    }

    pub fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            if let Some(event) = self.perform(action) {
                self.send(event);
            }
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        let mut line = format!("{action:?}");
        if let Action::Reply(_, reply, _) = &action {
            line = format!("Reply {line} json {}", serde_json::to_string(&reply.body).unwrap());
        }
        self.log.push(line);
        match action {
            Action::StartServer(id, role, _) => {
                if self.start_error {
                    return Some(Event::ServerStarted(role, Err(Error::failed("out of processes"))));
                }
                let (rows, ready) = self.saved.clone().unwrap_or_default();
                let removed = |key: &Key| rows.iter().any(|row| row.removed && row.digest == key.digest());
                let server = ServerModel {
                    is_candidate: role == Role::Candidate,
                    list: rows.iter().map(|row| row.digest).collect(),
                    ready: ready.into_iter().filter(|(key, _)| !removed(key)).collect(),
                    ..ServerModel::default()
                };
                self.servers.insert(id, server);
                let process = process(1000 + id.0 as u32);
                return Some(Event::ServerStarted(role, Ok(Started { id, process })));
            }
            Action::EndServer(id) => {
                if let Some(server) = self.servers.get_mut(&id) {
                    server.is_killed = true;
                }
                let status = Some(Ended::Signal(Signal::KILL.as_raw()));
                return Some(Event::ServerEnded { id, status, oom: false });
            }
            Action::KillServer(id) => {
                if let Some(server) = self.servers.get_mut(&id) {
                    server.is_killed = true;
                    self.dismissed += u64::from(server.is_candidate);
                }
            }
            Action::Reply(id, Numbered { number, body }, file) => self.reply(id, number, body, file),
            Action::WriteInitReply { id, number, is_first, .. } => {
                let result = self.init_error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
                return Some(Event::InitReplyWritten { id, number, is_first, result });
            }
            Action::RegisterBacking(id, number, key) => {
                let file = self.machine.backings().file(&key).expect("the machine holds the file");
                let identity = fds::identity(file).unwrap();
                assert!(self.frozen.contains(&identity), "a backing is registered that is not immutable");
                if let Some(errno) = self.backing_error {
                    let error = io::Error::from_raw_os_error(errno);
                    return Some(Event::BackingRegistered(id, number, key, Err(error)));
                }
                let backing = self.next_backing;
                self.next_backing += 1;
                self.kernel.insert(backing, Key::of(&key));
                return Some(Event::BackingRegistered(id, number, key, Ok(backing)));
            }
            Action::CloseBackings(ids) => {
                for id in ids {
                    let key = self.kernel.remove(&id).expect("a backing is closed once");
                    assert!(!self.in_use(key), "a backing in use is closed");
                    for server in self.servers.values().filter(|server| !server.is_killed) {
                        let hands_out = server.ready.contains_key(&key) && !server.refuses(key);
                        assert!(!hands_out, "a server still answers opens with a closed backing");
                    }
                }
            }
            Action::StartJob(id, task) => self.start_job(id, task),
            Action::Save => {
                let snapshot = self.machine.snapshot(process(1), false, Figures::default());
                let ready = snapshot.backings.iter().filter_map(|row| Some((Key::of(&row.key), row.id?)));
                self.saved = Some((snapshot.condemned, ready.collect()));
            }
            Action::WriteRecord => {
                let result = if self.record_error { Err(Error::failed("no room")) } else { Ok(()) };
                return Some(Event::RecordWritten(result));
            }
            Action::Respond(caller, response, _) => {
                self.respond(caller);
                self.responses.push((caller, response));
            }
            Action::RespondState(caller) | Action::RespondInodes(caller, _) => self.respond(caller),
            Action::BecomeProgram(_, caller) => {
                return Some(Event::ExecFailed(caller, Error::failed("exec failed")));
            }
            Action::GiveUp(_) => self.gave_up = true,
            Action::Watch(_)
            | Action::Resend
            | Action::Ring
            | Action::Announce
            | Action::StoreBackings
            | Action::ForgetBackings(_)
            | Action::AnnounceStop
            | Action::StopReader { .. }
            | Action::CountReplaced
            | Action::KeepCaller(..) => {}
        }
        None
    }

    fn respond(&mut self, caller: CallerId) {
        // A response to a caller that has disconnected is ignored.
        if let Some(count) = self.pending_requests.get_mut(&caller) {
            *count = count.checked_sub(1).expect("a request gets one response");
        }
    }

    fn reply(&mut self, id: ServerId, number: u64, reply: ServerReply, file: Option<OwnedFd>) {
        assert!(self.replied.insert((id, number)), "a request gets one reply");
        let Some(server) = self.servers.get_mut(&id) else { return };
        let Some((_, request)) = server.pending.take_if(|(pending, _)| *pending == number) else { return };
        match (request, reply) {
            (ServerRequest::Reserve { key, .. }, ServerReply::Created) => {
                let identity = fds::identity(file.expect("a file")).unwrap();
                server.filling.insert(Key::of(&key), identity);
            }
            (ServerRequest::Freeze { key }, ServerReply::Frozen { .. }) => {
                let identity = fds::identity(file.expect("a file")).unwrap();
                assert!(self.frozen.contains(&identity), "a server verifies a file that is not frozen");
                server.filling.insert(Key::of(&key), identity);
            }
            (ServerRequest::Reserve { key, .. }, ServerReply::Registered(backing)) => {
                assert_eq!(self.kernel.get(&backing), Some(&Key::of(&key)), "the kernel has this backing");
                server.ready.insert(Key::of(&key), backing);
            }
            (ServerRequest::Register { key, identity, .. }, ServerReply::Registered(backing)) => {
                assert!(
                    self.frozen.contains(&identity),
                    "a server gets the id of a backing that was not frozen"
                );
                assert_eq!(self.kernel.get(&backing), Some(&Key::of(&key)), "the kernel has this backing");
                server.filling.remove(&Key::of(&key));
                server.ready.insert(Key::of(&key), backing);
            }
            (ServerRequest::Evict { keys }, reply) => {
                let closed = if let ServerReply::Evicted(closed) = reply { closed } else { Vec::new() };
                let still_registered: BTreeSet<Key> =
                    keys.iter().filter(|key| !closed.contains(key)).map(Key::of).collect();
                let backings = self.kernel.iter().filter(|(_, key)| still_registered.contains(key));
                server.ready.extend(backings.map(|(id, key)| (*key, *id)));
            }
            (ServerRequest::Serving, ServerReply::Done) => server.is_candidate = false,
            _ => {}
        }
    }

    fn start_job(&mut self, id: JobId, task: Task) {
        let name = format!("{task:?}");
        let name = name.split(['(', ' ']).next().unwrap_or_default().to_owned();
        let (mut frozen, mut keys) = (None, Vec::new());
        match task {
            Task::FreezeBacking { key, .. } => {
                let file = self.machine.backings().file(&key).expect("the machine holds the file");
                frozen = Some(fds::identity(file).unwrap());
            }
            Task::FindUnused(files) => keys = files.iter().map(Key::of).collect(),
            Task::CreateBacking { .. }
            | Task::Remember(..)
            | Task::Unmount(_)
            | Task::CloseFiles(_)
            | Task::CheckProgram(_) => {}
        }
        self.jobs.push(JobModel { id, name, frozen, keys });
    }
}
