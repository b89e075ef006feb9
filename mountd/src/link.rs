//! What server and supervisor say to each other: the server asks, the supervisor answers, one at a time.
//!
//! Questions have numbers. A supervisor that took the place of a dead one says [`Answer::Again`]: whoever waits for an
//! answer then asks once more, and answers to older questions are dropped. So every question may come twice.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
pub use stencilfs::control::{Cache, FileKey};
use stencilfs::control::{Channel, Failure};
use stencilfs::error::{Error, Result};
use stencilfs::sys::wait::poll_for;

/// Most backings that one question or answer names.
pub const MOST_KEYS: usize = 64;

/// A numbered question.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Question {
    /// Greater than that of every earlier one of the same server; never 0.
    pub number: u64,
    /// What is asked.
    pub ask: Ask,
}

/// The answer to the question of that number.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// The question's.
    pub number: u64,
    /// What is answered.
    pub answer: Answer,
}

/// What a server asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Who this server is, and the reply to INIT that it gives; its in-flight table comes as descriptor. Answered by
    /// [`Answer::Done`] when it speaks these words, and the reply is the one that the kernel has.
    Handshake {
        /// Its [`CONTROL_VERSION`](stencilfs::control::CONTROL_VERSION).
        control_version: u32,
        /// Its version.
        version: String,
        /// The parts of its sandbox that this kernel could not do, in words.
        lacks: Vec<String>,
        /// The whole packet.
        reply: Vec<u8>,
    },
    /// This server answers the kernel from now on. Answered by `Done`.
    Serving,
    /// Room for a backing, and an empty file for it. Answered by [`Answer::Room`] with the file,
    /// [`Answer::Evict`], or [`Answer::Backing`] with the file of one that is ready.
    Reserve {
        /// For which file.
        key: FileKey,
        /// Length of the file.
        size: u64,
        /// Bytes of data in it.
        bytes: u64,
    },
    /// These are handed out no more: close those that nobody uses. Answered by [`Answer::Evicted`].
    Evict {
        /// Which; at most [`MOST_KEYS`].
        keys: Vec<FileKey>,
    },
    /// The backing is full: freeze it. Answered by `Done`.
    Freeze {
        /// Of which file.
        key: FileKey,
    },
    /// The frozen backing holds what it must: register it. Answered by [`Answer::Backing`].
    Register {
        /// Of which file.
        key: FileKey,
        /// `st_dev` and `st_ino` of what was compared.
        identity: (u64, u64),
    },
    /// No backing for that file, and why; `None` when it is tried anew. Answered by `Done`.
    Decode {
        /// Of which file.
        key: FileKey,
        /// In words.
        why: Option<String>,
    },
    /// The backing is given up: its room is free again. Answered by `Done`.
    GiveBack {
        /// Of which file.
        key: FileKey,
    },
    /// So much of a backing is filled. Answered by `Done`.
    Progress {
        /// Of which file.
        key: FileKey,
        /// Bytes of data.
        bytes: u64,
    },
    /// The list of condemned templates is acted upon. Answered by `Done`.
    Condemned {
        /// How often the bell was rung before the list was read.
        ring: u32,
        /// So long the last open of one of them may take to be seen.
        grace_ms: u64,
    },
    /// The server cannot start. Answered by `Done`.
    GiveUp {
        /// Why.
        failure: Failure,
    },
}

/// What the supervisor answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is not.
    Refused(Failure),
    /// The file for a backing comes with this.
    Room,
    /// There would be room without these: hand them out no more, then ask to [`Ask::Evict`] them.
    Evict(Vec<FileKey>),
    /// These were closed; the others of the question are in use.
    Evicted(Vec<FileKey>),
    /// The backing's id on the connection.
    Backing(u32),
    /// Another supervisor listens now: whoever waits for an answer asks again.
    Again,
}

/// The server's end.
#[derive(Debug)]
pub struct Link(Mutex<End>);

#[derive(Debug)]
struct End {
    channel: Channel,
    /// The connection to the kernel.
    kernel: Option<OwnedFd>,
    /// Number of the last question.
    last: u64,
    /// How long an answer is waited for, where not for ever.
    patience: Option<Duration>,
}

impl End {
    /// Waits for the supervisor, or for whoever takes its place: but not when the connection to the kernel is over, for
    /// then nobody will.
    fn receive(&self) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
        let mut both = vec![PollFd::new(&self.channel, PollFlags::IN)];
        both.extend(self.kernel.as_ref().map(|kernel| PollFd::new(kernel, PollFlags::empty())));
        match rustix::io::retry_on_intr(|| poll_for(&mut both, self.patience))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ if both[0].revents().is_empty() => Err(io::ErrorKind::NotConnected.into()),
            _ => self.channel.receive(),
        }
    }
}

impl Link {
    /// Asks through that socket. A server that nobody needs yet waits only so long for an answer: if the supervisor
    /// dies before it serves, nobody would know of it.
    pub fn new(socket: OwnedFd, kernel: Option<OwnedFd>, patience: Option<Duration>) -> Link {
        Link(Mutex::new(End { channel: Channel::new(socket), kernel, last: 0, patience }))
    }

    /// From now on answers are waited for, however long it takes.
    pub fn wait_for_ever(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).patience = None;
    }

    /// Asks and waits. A refusal comes back as the error it is.
    ///
    /// # Errors
    /// When the supervisor refuses. A dead one is no error: the answer comes from whoever takes its place.
    pub fn ask(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> Result<(Answer, Option<OwnedFd>)> {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.last += 1;
        let question = Question { number: end.last, ask: ask.clone() };
        let gone = |e| Error::failed("the supervisor is gone").because(e);
        end.channel.send(&question, fd).map_err(gone)?;
        loop {
            match end.receive().map_err(gone)? {
                Some((Reply { answer: Answer::Again, .. }, _)) => {
                    end.channel.send(&question, fd).map_err(gone)?;
                }
                Some((reply, fd)) if reply.number == question.number => {
                    return match reply.answer {
                        Answer::Refused(failure) => Err(failure.into_error()),
                        answer => Ok((answer, fd)),
                    };
                }
                Some(_) => {}
                None => return Err(gone(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Asks what can only be answered by done.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn tell(&self, ask: &Ask) -> Result<()> {
        match self.ask(ask, None)?.0 {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// The supervisor answered what was not asked.
pub fn unexpected(answer: &Answer) -> Error {
    Error::failed(format!("the supervisor gave an answer to another question: {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_question_survives_a_new_supervisor() {
        let (ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, None);
        let server = thread::spawn(move || {
            link.tell(&Ask::Serving).unwrap();
            link.tell(&Ask::Serving).unwrap();
        });
        let hear = || ours.receive::<Question>().unwrap().unwrap().0.number;
        let say = |number, answer| ours.send(&Reply { number, answer }, None).unwrap();
        assert_eq!(hear(), 1);
        say(0, Answer::Again);
        assert_eq!(hear(), 1, "it asks again");
        say(1, Answer::Done);
        say(1, Answer::Done);
        assert_eq!(hear(), 2, "the second answer to the first question is dropped");
        say(2, Answer::Done);
        server.join().unwrap();
    }

    #[test]
    fn a_server_that_nobody_knows_of_does_not_wait_for_ever() {
        let (_ours, theirs) = Channel::pair().unwrap();
        let link = Link::new(theirs.into(), None, Some(Duration::from_millis(5)));
        assert!(link.tell(&Ask::Serving).unwrap_err().to_string().contains("supervisor is gone"));
    }
}
