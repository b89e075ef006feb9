//! A new program takes the place of the server, or of the supervisor itself, while clones go on.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use stencilfs::control::{MAX_INODES, Received, Request, Response};
use stencilfs::error::{Error, Result};
use stencilfs::sys::{descriptor, fuse_dev, process};

use crate::control::answer_with;
use crate::handed;
use crate::jobs::Job;
use crate::kept::{self, Program};
use crate::supervisor::{Candidate, PROBATION, Purpose, Server, Supervisor};

impl Supervisor {
    /// Answers a caller of the control socket, now or when it is done.
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
                self.callers.say(id, snapshot.and_then(|snapshot| answer_with(&snapshot)));
            }
            Request::Backing { index } => {
                let file = self.backings.file(index).and_then(kept::copy);
                self.callers.say(id, file.map(|file| (Response::Descriptor, Some(file))));
            }
            Request::Condemn { digests } => self.condemn(id, &digests),
            Request::Confirm { digests } => {
                let still = self.confirm(id, &digests);
                self.callers.answer(Some(id), still);
            }
            Request::Release { digests, removed } => self.release(id, &digests, removed),
            Request::Inodes { numbers } => {
                let known = match numbers.len() > MAX_INODES {
                    true => Err(Error::usage(format!("more than {MAX_INODES} inode numbers"))),
                    false => fuse_dev::known_inodes(&self.kept.fuse, &numbers)
                        .map_err(|e| Error::failed("cannot ask the kernel for an inode").because(e)),
                };
                self.callers.say(id, known.map(|known| (Response::Inodes { known }, None)));
            }
            Request::Refresh => self.ring(id, Vec::new()),
            Request::Unmount { mode } => self.unmount(Some(id), mode),
            Request::Restart { supervisor } => {
                if let Err(error) = self.restart(id, supervisor, fd) {
                    self.callers.answer(Some(id), Err(error));
                }
            }
        }
    }

    fn restart(&mut self, caller: u64, supervisor: bool, program: Option<OwnedFd>) -> Result<()> {
        let program = program.ok_or_else(|| Error::failed("no program came with the question"))?;
        let checked = self.jobs.iter().any(|(_, purpose)| matches!(purpose, Purpose::Check(..)));
        if checked || self.candidate.is_some() || self.successor_program.is_some() {
            return Err(Error::try_again("another restart of this mount is under way"));
        }
        let program = Program::new(program);
        if !supervisor {
            return self.try_server(program, Some(caller));
        }
        self.save();
        let fail = |e| Error::failed("cannot hand on the ledger").because(e);
        let ledger = self.kept.ledger.read_only().map_err(fail)?;
        let job = Job::ask_program(PROBATION, &program, ledger)?;
        self.begin(Ok(job), Purpose::Check(program, caller));
        Ok(())
    }

    /// Starts a server beside the present one, which goes on until the new one answers the kernel.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn try_server(&mut self, program: Program, caller: Option<u64>) -> Result<()> {
        self.save();
        let server = Server::start(&self.kept, &self.backings, &program, true)?;
        self.candidate = Some(Candidate { server, program, caller, table: None, failure: None });
        Ok(())
    }

    /// The new one answers the kernel.
    pub(crate) fn promote_candidate(&mut self) {
        let Some(Candidate { mut server, program, caller, table, .. }) = self.candidate.take() else {
            return;
        };
        server.row.serving = true;
        log::info!("server {} of {} serves now", server.row.process.pid, program.name.display());
        let old = self.server.replace(server);
        self.kept.restarts += 1;
        self.kept.previous = Some(std::mem::replace(&mut self.kept.program, program));
        self.to_close.extend(self.backings.forget_unfinished());
        self.watchdog.watch(table);
        self.announce();
        // Only now: whoever takes over from here on finds the new one.
        if let Some(old) = old {
            self.dismiss(old);
            self.save();
        }
        self.callers.answer(caller, Ok(()));
    }

    /// The new one does not do: the old one goes on, and gets what the new one had read.
    pub(crate) fn candidate_failed(&mut self, why: &str) {
        let Some(candidate) = self.candidate.take() else { return };
        let name = candidate.program.name.display().to_string();
        let error = match candidate.failure {
            Some(failure) => failure.into_error(),
            None => Error::failed(why),
        };
        let error = error.context(format!("the new server, {name}, does not serve; the old one goes on"));
        log::error!("{error}");
        self.dismiss(candidate.server);
        self.resend();
        self.callers.answer(candidate.caller, Err(error));
    }

    /// Becomes another program, with every descriptor; that one then starts a server of its own. Comes back only when
    /// that fails.
    pub(crate) fn become_program(&mut self, program: Program, caller: u64) {
        self.save();
        let result = self.exec(&program, caller);
        let error = Error::io("cannot become the program", &program.name, result.unwrap_or_else(|e| e));
        log::error!("{error}");
        self.callers.answer(Some(caller), Err(error));
    }

    fn exec(&self, program: &Program, caller: u64) -> std::io::Result<std::io::Error> {
        let mut kept: Vec<(&str, BorrowedFd<'_>)> = vec![
            ("fuse", self.kept.fuse.as_fd()),
            ("ledger", self.kept.ledger.as_fd()),
            ("counters", self.kept.stats.page().fd().as_fd()),
            ("record", self.kept.record.folder()),
            ("listener", self.kept.listener.as_fd()),
            ("previous", self.kept.program.file.as_fd()),
            ("program", program.file.as_fd()),
        ];
        kept.extend(self.server.as_ref().map(|server| ("peer", server.link.as_fd())));
        kept.extend(self.callers.channel(caller).map(|channel| ("caller", channel)));
        kept.extend(self.backings.all_files().map(|file| ("backing", file.as_fd())));
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command.arg0("stencil-mountd").arg("resume").arg(handed::argument(&kept)).arg("--");
        command.arg(&self.kept.options.mountpoint);
        // A signal in between waits for the new program.
        process::hold_signals(true)?;
        let error = match kept.iter().try_for_each(|(_, fd)| descriptor::keep_at_exec(fd).map(drop)) {
            Ok(()) => command.exec(),
            Err(error) => error,
        };
        // Still here: no server may inherit any of it by chance.
        for (_, fd) in &kept {
            descriptor::close_at_exec(fd)?;
        }
        process::hold_signals(false)?;
        Ok(error)
    }
}
