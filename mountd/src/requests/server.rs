//! What servers ask, and what is checked before it is done.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use stencilfs::control::{CONTROL_VERSION, Failure, FileKey, Received};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::units::Bytes;

use crate::jobs::{self, Job, Outcome};
use crate::kept;
use crate::link::{Answer, Ask, MOST_KEYS, Question, Reply};
use crate::supervisor::{Purpose, Server, Supervisor};

/// Making and freezing files may wait for the filesystem.
const FILES: Duration = Duration::from_secs(30);
/// The search for users of backings.
const SEARCH: Duration = Duration::from_secs(2);

/// A question whose answer is being found.
#[derive(Debug)]
pub struct Pending {
    number: u64,
    what: Sought,
}

/// What is being done for it.
#[derive(Debug)]
enum Sought {
    /// The file of a backing is made.
    Made(FileKey),
    /// A backing is frozen.
    Frozen(FileKey),
    /// It is sought which of these are in use.
    Unused(Vec<FileKey>),
}

impl Supervisor {
    /// Takes one message of the server, or of the candidate.
    pub(crate) fn hear(&mut self, candidate: bool) {
        let heard = match candidate {
            true => self.candidate.as_ref().map(|c| c.server.link.try_receive::<Question>()),
            false => self.server.as_ref().map(|s| s.link.try_receive::<Question>()),
        };
        match heard {
            Some(Ok(Received::Message(question, fd))) => self.asked(candidate, question, fd),
            Some(Ok(Received::Nothing)) | None => {}
            Some(Ok(Received::Closed) | Err(_)) if candidate => self.candidate_failed("it has ended"),
            Some(Ok(Received::Closed) | Err(_)) => self.server_died(),
        }
    }

    fn asker(&mut self, candidate: bool) -> Option<&mut Server> {
        if candidate { self.candidate.as_mut().map(|c| &mut c.server) } else { self.server.as_mut() }
    }

    fn asked(&mut self, candidate: bool, question: Question, fd: Option<OwnedFd>) {
        let number = question.number;
        let Some(server) = self.asker(candidate) else { return };
        if number <= server.heard {
            // It asked again since it did not know which supervisor had heard it.
            return;
        }
        if server.asking {
            log::error!("the server does not wait for its answers");
            return if candidate { self.candidate_failed("it asks out of turn") } else { self.server_died() };
        }
        server.heard = number;
        let answer = match question.ask {
            Ask::Handshake { control_version, version, lacks, reply } => Some(
                self.shake_hands(candidate, control_version, (version, lacks), reply, fd)
                    .map(|()| Answer::Done),
            ),
            Ask::Serving if candidate => {
                self.promote_candidate();
                return self.reply(false, number, Ok(Answer::Done), None);
            }
            Ask::GiveUp { failure } => {
                self.gives_up(candidate, failure);
                Some(Ok(Answer::Done))
            }
            _ if candidate => Some(Err(Error::failed("it does not serve yet"))),
            Ask::Serving => {
                if let Some(server) = &mut self.server {
                    server.row.serving = true;
                }
                (self.failure, self.start_at) = (None, None);
                self.announce();
                Some(Ok(Answer::Done))
            }
            Ask::Reserve { key, size, bytes } => self.reserve(number, key, Bytes::new(size), bytes),
            Ask::Freeze { key } => self.freeze(number, key),
            Ask::Evict { keys } => self.evict(number, keys),
            Ask::Register { key, identity } => {
                let id = self.backings.register(&self.kept.fuse, &key, identity);
                if id.is_ok() {
                    self.save();
                    self.notify.store_backings(&self.backings);
                }
                Some(id.map(Answer::Backing))
            }
            Ask::Decode { key, why } => {
                let noted = self.backings.decode(key, why);
                self.save();
                Some(noted.map(|()| Answer::Done))
            }
            Ask::GiveBack { key } => {
                self.to_close.extend(self.backings.give_back(&key));
                Some(Ok(Answer::Done))
            }
            Ask::Condemned { ring, grace_ms } => {
                self.acted(ring, grace_ms);
                Some(Ok(Answer::Done))
            }
            Ask::Progress { key, bytes } => {
                self.backings.progress(&key, bytes);
                Some(Ok(Answer::Done))
            }
        };
        if let Some(answer) = answer {
            self.reply(candidate, number, answer, None);
        }
    }

    fn gives_up(&mut self, candidate: bool, failure: Failure) {
        match &mut self.candidate {
            Some(new) if candidate => new.failure = Some(failure),
            _ => {
                log::error!("the server cannot start: {}", failure.clone().into_error());
                self.failure = Some(failure);
            }
        }
    }

    // Of these three the answer is none yet when it was given already, or a job finds it.

    fn reserve(&mut self, number: u64, key: FileKey, size: Bytes, bytes: u64) -> Option<Result<Answer>> {
        match self.backings.reserve(&self.kept.chosen, &key, bytes) {
            Ok(Answer::Room) => {
                let cache = self.kept.chosen.cache.clone();
                let job = Job::start(FILES, &self.kept.alone(&self.callers), || {
                    jobs::make_backing(&cache, size, Bytes::new(bytes)).map(Some)
                });
                self.find_answer(job, Pending { number, what: Sought::Made(key) })
            }
            Ok(Answer::Backing(id)) => match self.backings.copy(&key) {
                Ok(file) => {
                    self.reply(false, number, Ok(Answer::Backing(id)), Some(file));
                    None
                }
                Err(error) => Some(Err(error)),
            },
            other => Some(other),
        }
    }

    fn freeze(&mut self, number: u64, key: FileKey) -> Option<Result<Answer>> {
        let filled = self.backings.filled(&key);
        if let Ok(None) = filled {
            return Some(Ok(Answer::Done));
        }
        let job = filled.and_then(|filled| {
            let cache = &self.kept.chosen.cache;
            Job::start(FILES, &self.kept.alone(&self.callers), || {
                filled.map_or(Ok(()), |(file, room)| jobs::freeze_backing(cache, file, room)).map(|()| None)
            })
        });
        self.find_answer(job, Pending { number, what: Sought::Frozen(key) })
    }

    fn evict(&mut self, number: u64, mut keys: Vec<FileKey>) -> Option<Result<Answer>> {
        if self.candidate.is_some() {
            // It began with the backings of that moment: none may go before it serves.
            return Some(Ok(Answer::Evicted(Vec::new())));
        }
        keys.truncate(MOST_KEYS);
        let (store, device) = (self.kept.options.store.clone(), self.kept.device);
        let job = Job::start_saying(SEARCH * 2, &self.kept.alone(&self.callers), || {
            Ok((Outcome::Unused(jobs::unused(&store, device, &keys, SEARCH)?), None))
        });
        self.find_answer(job, Pending { number, what: Sought::Unused(keys) })
    }

    fn find_answer(&mut self, job: Result<Job>, pending: Pending) -> Option<Result<Answer>> {
        let server = self.server.as_mut().map_or(0, |s| {
            s.asking = true;
            s.row.process.pid
        });
        self.begin(job, Purpose::Ask(server, pending));
        None
    }

    /// A job has found the answer to a question; it is of use only to the server that asked.
    pub(crate) fn answered(&mut self, server: u32, pending: Pending, outcome: Outcome, fd: Option<OwnedFd>) {
        match &mut self.server {
            Some(asker) if asker.row.process.pid == server => asker.asking = false,
            _ => return,
        }
        let refused = |outcome| match outcome {
            Outcome::Failed(failure) => failure.into_error(),
            other => Error::failed(format!("a job gave another answer: {other:?}")),
        };
        let Pending { number, what } = pending;
        let (answer, file) = match (what, outcome, fd) {
            (Sought::Made(key), Outcome::Done, Some(file)) => {
                match self.backings.made(&key, file).and_then(kept::copy) {
                    Ok(file) => (Ok(Answer::Room), Some(file)),
                    Err(error) => (Err(error), None),
                }
            }
            (Sought::Frozen(key), Outcome::Done, _) => {
                self.backings.frozen(&key);
                (Ok(Answer::Done), None)
            }
            (Sought::Unused(keys), Outcome::Unused(places), _) => {
                let mut unused: Vec<FileKey> =
                    places.into_iter().filter_map(|place| keys.get(place as usize).cloned()).collect();
                if self.candidate.is_some() {
                    unused.clear();
                }
                self.notify.forget_backings(&self.backings, &unused);
                self.backings.close(&self.kept.fuse, &unused);
                (Ok(Answer::Evicted(unused)), None)
            }
            (_, outcome, _) => (Err(refused(outcome)), None),
        };
        if answer.is_ok() {
            self.save();
        }
        self.reply(false, number, answer, file);
    }

    /// A server that does not take its answer is of no use; of a candidate that is seen when it ends.
    fn reply(&mut self, candidate: bool, number: u64, answer: Result<Answer>, fd: Option<OwnedFd>) {
        let answer = answer.unwrap_or_else(|e| Answer::Refused(Failure::from(&e)));
        let Some(server) = self.asker(candidate) else { return };
        match server.link.try_send(&Reply { number, answer }, fd.as_ref().map(AsFd::as_fd)) {
            Err(e) if !candidate => {
                log::error!("the server takes no answer: {e}");
                self.server_died();
            }
            _ => {}
        }
    }

    /// The first reply goes to the kernel; later ones must be the same, for the kernel will not hear them.
    fn shake_hands(
        &mut self,
        candidate: bool,
        control_version: u32,
        (version, lacks): (String, Vec<String>),
        reply: Vec<u8>,
        table: Option<OwnedFd>,
    ) -> Result<()> {
        if control_version != CONTROL_VERSION {
            return Err(Error::failed(format!(
                "the server speaks version {control_version} of the words between processes, expected {CONTROL_VERSION}"
            )));
        }
        let first = self.kept.reply.is_none();
        if self.kept.reply.as_ref().is_some_and(|known| *known != reply) {
            return Err(Error::failed("this server asks the kernel for other things than the first one")
                .remedy("unmount and mount again with the new version"));
        }
        if first {
            // Written down before the kernel has it: a supervisor that takes over must not take another one.
            self.kept.reply = Some(reply.clone());
            self.save();
        }
        if !candidate {
            // One that was written down may not have come to the kernel; what that has it does not know any more.
            match fuse_dev::write_reply(&self.kept.fuse, &reply) {
                Err(e) if first => {
                    self.kept.reply = None;
                    self.save();
                    return Err(Error::failed("the kernel does not accept the handshake").because(e));
                }
                Err(e) if e.raw_os_error() != Some(libc::ENOENT) => {
                    return Err(Error::failed("the connection takes no reply").because(e));
                }
                _ => {}
            }
        }
        match (&mut self.candidate, &mut self.server) {
            (Some(new), _) if candidate => {
                (new.server.row.version, new.server.row.lacks) = (version, lacks);
                new.table = table;
            }
            (_, Some(server)) => {
                (server.row.version, server.row.lacks) = (version, lacks);
                self.watchdog.watch(table);
            }
            _ => {}
        }
        self.save();
        Ok(())
    }
}
