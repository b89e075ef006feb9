//! Handling of the results of jobs.

use stencilfs::control::FileKey;
use stencilfs::error::Error;

use super::backings::Frozen;
use super::{Machine, Purpose};
use crate::protocol::ServerReply;
use crate::protocol::fds;
use crate::supervisor::event::{Action, JobId, JobResult, ServerId};
use stencilfs::units::to_usize;

impl Machine {
    pub(super) fn job_ended(&mut self, job: JobId, result: JobResult) {
        let Some(purpose) = self.jobs.remove(&job) else { return };
        let failed = |result| match result {
            JobResult::Failed(error) => error,
            other => {
                log::debug!("unexpected result of a job: {other:?}");
                Error::failed("a helper process returned an unexpected result")
            }
        };
        match (purpose, result) {
            (Purpose::Create(id, number, key), result) => {
                if !self.end_job(id, number) {
                    return;
                }
                let created = match result {
                    JobResult::Done(Some(file)) => self.backings.created(&key, file).and_then(fds::copy),
                    other => Err(failed(other)),
                };
                let (reply, file) = match created {
                    Ok(file) => (Ok(ServerReply::Created), Some(file)),
                    Err(error) => (Err(error), None),
                };
                self.actions.extend([Action::Save, Action::reply(id, number, reply, file)]);
            }
            (Purpose::Freeze(id, number, key), result) => {
                if !self.end_job(id, number) {
                    return;
                }
                let frozen = match result {
                    JobResult::Done(_) => self.backings.frozen(&key, None),
                    JobResult::Decoded(decoded) => self.backings.frozen(&key, Some(decoded)),
                    other => Err(failed(other)),
                };
                let (reply, file) = match frozen {
                    Ok(Frozen { file, verified_at }) => (Ok(ServerReply::Frozen { verified_at }), Some(file)),
                    Err(error) => (Err(error), None),
                };
                self.actions.extend([Action::Save, Action::reply(id, number, reply, file)]);
            }
            (Purpose::Remember, result) => {
                if let JobResult::Failed(error) = result {
                    log::warn!("{error}");
                }
            }
            (Purpose::Scrubbed(id, number), result) => {
                if !self.end_job(id, number) {
                    return;
                }
                let reply = match result {
                    JobResult::Done(_) => Ok(ServerReply::Done),
                    other => Err(failed(other)),
                };
                self.actions.push(Action::reply(id, number, reply, None));
            }
            (Purpose::FindUnused(id, number, keys), result) => {
                if !self.end_job(id, number) {
                    return;
                }
                let reply = match result {
                    // A candidate that was started meanwhile has read a mount state with these backings.
                    JobResult::Unused(_) if self.handover.has_candidate() => Ok(Vec::new()),
                    JobResult::Unused(indices) => {
                        let unused =
                            indices.into_iter().filter_map(|index| keys.get(to_usize(index)).cloned());
                        let unused: Vec<FileKey> = unused.collect();
                        self.close_backings(&unused);
                        Ok(unused)
                    }
                    other => Err(failed(other)),
                };
                let reply = reply.map(ServerReply::Evicted);
                self.actions.extend([Action::Save, Action::reply(id, number, reply, None)]);
            }
            (Purpose::Unmount(caller, mode), result) => {
                let error = match result {
                    JobResult::Done(_) => None,
                    other => Some(failed(other)),
                };
                self.unmounted(caller, mode, error);
            }
            (Purpose::CloseFiles, result) => {
                self.shutdown.closed();
                if let JobResult::Failed(error) = result {
                    log::warn!(
                        "cannot close backing files in a helper process: {error}; the supervisor has closed them"
                    );
                }
            }
            (Purpose::Check(program, caller), JobResult::Done(_)) => {
                self.handover.check_passed(program, caller)
            }
            (Purpose::Check(_, caller), result) => {
                self.handover.check_failed();
                self.respond(Some(caller), Err(failed(result)));
            }
        }
    }

    /// Returns true if the server that made the request is still current and waits for the reply.
    fn end_job(&mut self, id: ServerId, number: u64) -> bool {
        self.lifecycle.get_mut(id).is_some_and(|server| server.end_job(number))
    }
}
