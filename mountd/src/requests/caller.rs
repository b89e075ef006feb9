//! Requests of callers of the control socket, and restarts: a new program takes the place of the server, or of the
//! supervisor itself, while clones continue.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use stencilfs::control::{MAX_INODES, Received, Request, Response};
use stencilfs::error::{Error, Result};
use stencilfs::sys::{descriptor, fuse_dev, process};

use crate::control::snapshot_reply;
use crate::handed;
use crate::jobs::Job;
use crate::kept::{self, Program};
use crate::supervisor::{Candidate, PROBATION, Purpose, Server, Supervisor};

impl Supervisor {
    /// Handles a request on the control socket; the reply is sent now or when the request is executed.
    pub(crate) fn called(&mut self, id: u64) {
        let (request, fd) = match self.callers.receive(id) {
            Some(Received::Message(request, fd)) => (request, fd),
            Some(Received::Nothing) => return,
            Some(Received::Closed) | None => return self.callers.drop_caller(id),
        };
        match request {
            Request::Snapshot => {
                let server = self.server.as_ref().map(|s| s.row.clone()).filter(|row| row.serving);
                let snapshot = self.snapshot(server);
                self.callers.reply(id, snapshot.and_then(|snapshot| snapshot_reply(&snapshot)));
            }
            Request::Backing { index } => {
                let file = self.backings.file(index).and_then(kept::duplicate);
                self.callers.reply(id, file.map(|file| (Response::Descriptor, Some(file))));
            }
            Request::Condemn { digests } => self.condemn(id, &digests),
            Request::Confirm { digests } => {
                let still = self.confirm(id, &digests);
                self.callers.reply_done(Some(id), still);
            }
            Request::Release { digests, removed } => self.release(id, &digests, removed),
            Request::Inodes { numbers } => {
                let held = match numbers.len() > MAX_INODES {
                    true => Err(Error::usage(format!("more than {MAX_INODES} inode numbers"))),
                    false => fuse_dev::known_inodes(&self.state.fuse, &numbers)
                        .map_err(|e| Error::failed("cannot query inodes of the kernel").because(e)),
                };
                self.callers.reply(id, held.map(|known| (Response::Inodes { known }, None)));
            }
            Request::Refresh => self.ring(id, Vec::new()),
            Request::Unmount { mode } => self.unmount(Some(id), mode),
            Request::Restart { supervisor } => {
                if let Err(error) = self.restart(id, supervisor, fd) {
                    self.callers.reply_done(Some(id), Err(error));
                }
            }
        }
    }

    fn restart(&mut self, caller: u64, supervisor: bool, program: Option<OwnedFd>) -> Result<()> {
        let program =
            program.ok_or_else(|| Error::failed("missing program: no descriptor came with the request"))?;
        let checked = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Check(..)));
        if checked || self.candidate.is_some() || self.successor_program.is_some() {
            return Err(Error::try_again("another restart of this mount is in progress"));
        }
        let program = Program::new(program);
        if !supervisor {
            return self.start_candidate(program, Some(caller));
        }
        self.save();
        let fail = |e| Error::failed("cannot pass on the ledger").because(e);
        let ledger = self.state.ledger.read_only().map_err(fail)?;
        let job = Job::ask_program(PROBATION, &program, ledger)?;
        self.add_job(Ok(job), Purpose::Check(program, caller));
        Ok(())
    }

    /// Starts a server of another program beside the current one, which continues until the new one serves the kernel.
    ///
    /// # Errors
    /// Returns an error if the server cannot be started.
    pub fn start_candidate(&mut self, program: Program, caller: Option<u64>) -> Result<()> {
        self.save();
        let server = Server::start(&self.state, &self.backings, &program, true)?;
        self.candidate = Some(Candidate { server, program, caller, table: None, failure: None });
        Ok(())
    }

    /// Replaces the current server by the candidate, which serves the kernel now.
    pub(crate) fn promote_candidate(&mut self) {
        let Some(Candidate { mut server, program, caller, table, .. }) = self.candidate.take() else {
            return;
        };
        server.row.serving = true;
        log::info!("server {} of {} serves", server.row.process.pid, program.name.display());
        let old = self.server.replace(server);
        self.state.restarts += 1;
        self.state.previous = Some(std::mem::replace(&mut self.state.program, program));
        self.to_close.extend(self.backings.forget_unfinished());
        self.watchdog.watch(table);
        self.announce();
        // After the record is written: a supervisor that takes over from here on finds the new server.
        if let Some(old) = old {
            self.dismiss(old);
            self.save();
        }
        self.callers.reply_done(caller, Ok(()));
    }

    /// Abandons the candidate: the old server continues, and serves the requests that the candidate has read.
    pub(crate) fn candidate_failed(&mut self, why: &str) {
        let Some(candidate) = self.candidate.take() else { return };
        let name = candidate.program.name.display().to_string();
        let error = match candidate.failure {
            Some(failure) => failure.into_error(),
            None => Error::failed(why),
        };
        let error =
            error.context(format!("the new server, {name}, does not serve; the old server continues"));
        log::error!("{error}");
        self.dismiss(candidate.server);
        self.resend();
        self.callers.reply_done(candidate.caller, Err(error));
    }

    /// Executes another program in this process, with all descriptors; that program then starts its own server. Returns
    /// only if that fails.
    pub(crate) fn exec_program(&mut self, program: Program, caller: u64) {
        self.save();
        let result = self.exec(&program, caller);
        let error = Error::io("cannot execute the program", &program.name, result.unwrap_or_else(|e| e));
        log::error!("{error}");
        self.callers.reply_done(Some(caller), Err(error));
    }

    fn exec(&self, program: &Program, caller: u64) -> std::io::Result<std::io::Error> {
        let mut fds: Vec<(&str, BorrowedFd<'_>)> = vec![
            ("fuse", self.state.fuse.as_fd()),
            ("ledger", self.state.ledger.as_fd()),
            ("counters", self.state.stats.page().fd().as_fd()),
            ("record", self.state.record.folder()),
            ("listener", self.state.listener.as_fd()),
            ("previous", self.state.program.file.as_fd()),
            ("program", program.file.as_fd()),
        ];
        fds.extend(self.server.as_ref().map(|server| ("peer", server.link.as_fd())));
        fds.extend(self.callers.channel(caller).map(|channel| ("caller", channel)));
        fds.extend(self.backings.all_files().map(|file| ("backing", file.as_fd())));
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command.arg0("stencil-mountd").arg("resume").arg(handed::argument(&fds)).arg("--");
        command.arg(&self.state.options.mountpoint);
        // A signal during exec(2) stays pending for the new program.
        process::hold_signals(true)?;
        let error = match fds.iter().try_for_each(|(_, fd)| descriptor::keep_at_exec(fd).map(drop)) {
            Ok(()) => command.exec(),
            Err(error) => error,
        };
        // exec(2) failed: servers must not inherit these descriptors.
        for (_, fd) in &fds {
            descriptor::close_at_exec(fd)?;
        }
        process::hold_signals(false)?;
        Ok(error)
    }
}
