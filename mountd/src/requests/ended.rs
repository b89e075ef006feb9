//! Handles the results of jobs.

use std::os::fd::OwnedFd;

use stencilfs::control::{Failure, UnmountMode};
use stencilfs::error::Result;

use crate::jobs::{Job, Outcome};
use crate::supervisor::{Purpose, Supervisor};

impl Supervisor {
    /// Adds a job. A job that could not be started fails at once.
    pub(crate) fn add_job(&mut self, job: Result<Job>, purpose: Purpose) {
        match job {
            Ok(job) => self.jobs.push((job, purpose)),
            Err(error) => self.ended(purpose, Outcome::Failed(Failure::from(&error)), None),
        }
    }

    pub(crate) fn update_jobs(&mut self) {
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
            Purpose::ServerRequest(server, pending) => self.job_ended(server, pending, outcome, fd),
            Purpose::Unmount(None, UnmountMode::Plain) if failed.is_some() => {
                self.unmount(None, UnmountMode::Lazy);
            }
            Purpose::Unmount(caller, mode) => {
                match (caller, &failed) {
                    (None, Some(error)) => {
                        log::error!("{error}");
                        // The next signal makes another attempt.
                        self.state.terminations = 0;
                    }
                    (None, None) if mode == UnmountMode::Lazy => {
                        log::warn!("the mount is in use: detached, and served until its last use ends");
                    }
                    _ => {}
                }
                self.callers.reply_done(caller, failed.map_or(Ok(()), Err));
            }
            Purpose::Close => {}
            Purpose::Check(program, caller) => match failed {
                None => self.successor_program = Some((program, caller)),
                Some(error) => self.callers.reply_done(Some(caller), Err(error)),
            },
        }
    }
}
