//! What servers ask, and what is checked before it is done.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use stencilfs::control::{CONTROL_VERSION, FileKey, Received};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::units::Bytes;

use crate::jobs::{self, Job, Outcome};
use crate::link::{Answer, Ask, MOST_KEYS, Question, Reply};
use crate::supervisor::{Purpose, Supervisor};
use stencilfs::control::Failure;

/// Making and freezing files may wait for the filesystem.
const FILES: Duration = Duration::from_secs(30);
/// The search for users of backings.
const SEARCH: Duration = Duration::from_secs(2);

/// A question whose answer is being found, with its number.
#[derive(Debug)]
pub enum Pending {
    /// The file of a backing is made.
    Made(u64, FileKey),
    /// A backing is frozen.
    Frozen(u64, FileKey),
    /// It is sought which of these are in use.
    Unused(u64, Vec<FileKey>),
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

    fn asked(&mut self, candidate: bool, question: Question, fd: Option<OwnedFd>) {
        let number = question.number;
        let server =
            if candidate { self.candidate.as_mut().map(|c| &mut c.server) } else { self.server.as_mut() };
        let Some(server) = server else { return };
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
            Ask::Handshake { control_version, version, lacks, reply } => self
                .shake_hands(candidate, control_version, (version, lacks), reply, fd)
                .map(|()| Answer::Done),
            Ask::Serving if candidate => {
                self.promote_candidate();
                return self.reply(number, Ok(Answer::Done), None);
            }
            Ask::GiveUp { failure } => {
                match &mut self.candidate {
                    Some(new) if candidate => new.failure = Some(failure),
                    _ => {
                        log::error!("the server cannot start: {}", failure.clone().into_error());
                        self.failure = Some(failure);
                    }
                }
                Ok(Answer::Done)
            }
            _ if candidate => Err(Error::failed("it does not serve yet")),
            Ask::Serving => {
                if let Some(server) = &mut self.server {
                    server.serving = true;
                }
                (self.failure, self.start_at) = (None, None);
                self.announce();
                Ok(Answer::Done)
            }
            ask => match self.about_backings(number, ask) {
                Some(answer) => answer,
                None => return,
            },
        };
        if candidate {
            let reply =
                Reply { number, answer: answer.unwrap_or_else(|e| Answer::Refused(Failure::from(&e))) };
            if let Some(candidate) = &self.candidate {
                let _ = candidate.server.link.try_send(&reply, None);
            }
            return;
        }
        self.reply(number, answer, None);
    }

    /// Nothing when a job finds the answer.
    fn about_backings(&mut self, number: u64, ask: Ask) -> Option<Result<Answer>> {
        Some(match ask {
            Ask::Reserve { key, size, bytes } => {
                match self.backings.reserve(&self.kept.chosen, &key, bytes) {
                    Ok(Answer::Room) => {
                        let cache = self.kept.chosen.cache.clone();
                        let (size, bytes) = (Bytes::new(size), Bytes::new(bytes));
                        let job = Job::start(FILES, &self.kept.fuse, || {
                            jobs::make_backing(&cache, size, bytes).map(Some)
                        });
                        self.find_answer(job, Pending::Made(number, key));
                        return None;
                    }
                    Ok(Answer::Backing(id)) => {
                        match self.backings.copy(&key) {
                            Ok(file) => self.reply(number, Ok(Answer::Backing(id)), Some(file)),
                            Err(error) => self.reply(number, Err(error), None),
                        }
                        return None;
                    }
                    other => other,
                }
            }
            Ask::Freeze { key } => {
                let filled = self.backings.filled(&key);
                if let Ok(None) = filled {
                    return Some(Ok(Answer::Done));
                }
                let job = filled.and_then(|filled| {
                    let cache = &self.kept.chosen.cache;
                    Job::start(FILES, &self.kept.fuse, || {
                        filled
                            .map_or(Ok(()), |(file, room)| jobs::freeze_backing(cache, file, room))
                            .map(|()| None)
                    })
                });
                self.find_answer(job, Pending::Frozen(number, key));
                return None;
            }
            // It began with the backings of that moment: none may go before it serves.
            Ask::Evict { .. } if self.candidate.is_some() => Ok(Answer::Evicted(Vec::new())),
            Ask::Evict { mut keys } => {
                keys.truncate(MOST_KEYS);
                let (store, device) = (self.kept.options.store.clone(), self.kept.device);
                let job = Job::start_saying(SEARCH * 2, &self.kept.fuse, || {
                    Ok((Outcome::Unused(jobs::unused(&store, device, &keys, SEARCH)?), None))
                });
                self.find_answer(job, Pending::Unused(number, keys));
                return None;
            }
            Ask::Register { key, identity } => {
                let id = self.backings.register(&self.kept.fuse, &key, identity);
                if id.is_ok() {
                    self.save();
                    self.notify.store_backings(&self.backings);
                }
                id.map(Answer::Backing)
            }
            Ask::Decode { key, why } => {
                let noted = self.backings.decode(key, why);
                self.save();
                noted.map(|()| Answer::Done)
            }
            Ask::GiveBack { key } => {
                self.to_close.extend(self.backings.give_back(&key));
                Ok(Answer::Done)
            }
            Ask::Progress { key, bytes } => {
                self.backings.progress(&key, bytes);
                Ok(Answer::Done)
            }
            Ask::Handshake { .. } | Ask::Serving | Ask::GiveUp { .. } => Ok(Answer::Done),
        })
    }

    fn find_answer(&mut self, job: Result<Job>, pending: Pending) {
        let server = self.server.as_mut().map_or(0, |s| {
            s.asking = true;
            s.row.process.pid
        });
        self.begin(job, Purpose::Ask(server, pending));
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
        match (pending, outcome, fd) {
            (Pending::Made(number, key), Outcome::Done, Some(file)) => {
                let made = self.backings.made(&key, file).and_then(|file| {
                    file.try_clone().map_err(|e| Error::failed("out of descriptors").because(e))
                });
                match made {
                    Ok(file) => {
                        self.save();
                        self.reply(number, Ok(Answer::Room), Some(file));
                    }
                    Err(error) => self.reply(number, Err(error), None),
                }
            }
            (Pending::Frozen(number, key), Outcome::Done, _) => {
                self.backings.frozen(&key);
                self.save();
                self.reply(number, Ok(Answer::Done), None);
            }
            (Pending::Unused(number, keys), Outcome::Unused(places), _) => {
                let mut unused: Vec<FileKey> =
                    places.into_iter().filter_map(|place| keys.get(place as usize).cloned()).collect();
                if self.candidate.is_some() {
                    unused.clear();
                }
                self.notify.forget_backings(&self.backings, &unused);
                self.backings.close(&self.kept.fuse, &unused);
                self.save();
                self.reply(number, Ok(Answer::Evicted(unused)), None);
            }
            (
                Pending::Made(number, _) | Pending::Frozen(number, _) | Pending::Unused(number, _),
                outcome,
                _,
            ) => self.reply(number, Err(refused(outcome)), None),
        }
    }

    /// A server that does not take its answer is of no use.
    fn reply(&mut self, number: u64, answer: Result<Answer>, fd: Option<OwnedFd>) {
        let answer = answer.unwrap_or_else(|e| Answer::Refused(Failure::from(&e)));
        let Some(server) = &self.server else { return };
        if let Err(e) = server.link.try_send(&Reply { number, answer }, fd.as_ref().map(AsFd::as_fd)) {
            log::error!("the server takes no answer: {e}");
            self.server_died();
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
        match &self.kept.reply {
            None => {
                fuse_dev::write_reply(&self.kept.fuse, &reply)
                    .map_err(|e| Error::failed("the kernel does not accept the handshake").because(e))?;
                self.kept.reply = Some(reply);
            }
            Some(first) if *first == reply => {}
            Some(_) => {
                return Err(Error::failed("this server asks the kernel for other things than the first one")
                    .remedy("unmount and mount again with the new version"));
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
        Ok(())
    }
}
