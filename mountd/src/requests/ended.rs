//! What becomes of a job that has ended.

use std::os::fd::OwnedFd;

use stencilfs::control::{Failure, UnmountMode};
use stencilfs::error::Result;

use crate::jobs::{Job, Outcome};
use crate::supervisor::{Purpose, Supervisor};

impl Supervisor {
    /// Waits for a job's end; one that cannot begin ends at once.
    pub(crate) fn begin(&mut self, job: Result<Job>, purpose: Purpose) {
        match job {
            Ok(job) => self.jobs.push((job, purpose)),
            Err(error) => self.ended(purpose, Outcome::Failed(Failure::from(&error)), None),
        }
    }

    pub(crate) fn see_to_jobs(&mut self) {
        let mut at = 0;
        while let Some((job, _)) = self.jobs.get(at) {
            match job.outcome() {
                Some((outcome, fd)) => {
                    let (_, purpose) = self.jobs.remove(at);
                    self.ended(purpose, outcome, fd);
                }
                None => at += 1,
            }
        }
    }

    fn ended(&mut self, purpose: Purpose, outcome: Outcome, fd: Option<OwnedFd>) {
        let failed = match &outcome {
            Outcome::Failed(failure) => Some(failure.clone().into_error()),
            _ => None,
        };
        match purpose {
            Purpose::Ask(server, pending) => self.answered(server, pending, outcome, fd),
            Purpose::Unmount(None, UnmountMode::Plain) if failed.is_some() => {
                self.unmount(None, UnmountMode::Lazy);
            }
            Purpose::Unmount(caller, mode) => {
                match (caller, &failed) {
                    (None, Some(error)) => {
                        log::error!("{error}");
                        // The next signal tries it anew.
                        self.kept.terminations = 0;
                    }
                    (None, None) if mode == UnmountMode::Lazy => {
                        log::warn!("it is in use: detached, and served until its last user ends");
                    }
                    _ => {}
                }
                self.callers.answer(caller, failed.map_or(Ok(()), Err));
            }
            Purpose::Close => {}
            Purpose::Check(program, caller) => match failed {
                None => self.successor_program = Some((program, caller)),
                Some(error) => self.callers.answer(Some(caller), Err(error)),
            },
        }
    }
}
