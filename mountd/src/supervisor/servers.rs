//! Starting servers, and what one is to the supervisor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use stencilfs::control::{Channel, ServerRow};
use stencilfs::error::{Error, Result};
use stencilfs::sys::cgroup::OomKills;
use stencilfs::sys::process::{self, ProcessId};

use crate::backings::Backings;
use crate::handed;
use crate::kept::{Kept, Program};
use crate::server::BESIDE;

/// A process that answers the kernel, or is about to.
#[derive(Debug)]
pub struct Server {
    /// Which, and what it says of itself.
    pub row: ServerRow,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// The way to it.
    pub link: Channel,
    /// When it was started, or taken over.
    pub since: Instant,
    /// Requests of the kernel that were answered before it came.
    pub answers: u64,
    /// Number of the last question that was taken up: one that comes twice is answered once.
    pub heard: u64,
    /// True while a job finds its answer.
    pub asking: bool,
    /// What the OOM killer had done in its control group before.
    pub oom_kills: Option<OomKills>,
    /// How often the bell had been rung when it was started, where that is known.
    pub born: Option<u32>,
}

impl Server {
    /// Starts one, `beside` another that serves or in its place. It inherits every descriptor that a new supervisor
    /// would need, by number, and reads everything else from the ledger.
    ///
    /// # Errors
    /// When there can be no child.
    pub fn start(kept: &Kept, backings: &Backings, program: &Program, beside: bool) -> Result<Server> {
        let fail = |e: std::io::Error| {
            Error::failed("cannot start a server")
                .because(e)
                .remedy("see the limits of processes and open files")
        };
        let (ours, theirs) = Channel::pair().map_err(fail)?;
        let ledger = kept.ledger.read_only().map_err(fail)?;
        let named = [
            ("fuse", kept.fuse.as_fd()),
            ("link", theirs.as_fd()),
            ("peer", ours.as_fd()),
            ("ledger", ledger.as_fd()),
            ("counters", kept.stats.page().fd().as_fd()),
            ("program", program.file.as_fd()),
        ];
        let backings = backings.files().map(AsFd::as_fd);
        let inherited: Vec<BorrowedFd<'_>> = named.iter().map(|(_, fd)| *fd).chain(backings).collect();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command
            .arg0("stencil-mountd")
            .arg("serve")
            .args(beside.then_some(BESIDE))
            .args([&handed::argument(&named), "--"])
            .arg(&kept.options.mountpoint);
        for word in
            ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]
        {
            command.env_remove(word);
        }
        // Out of reach of Ctrl-C at the supervisor's terminal.
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = process::inherit_all(&mut command, &inherited)
            .spawn()
            .map_err(|e| Error::io("cannot start a server", &program.name, e))?;
        let process =
            ProcessId::of(child.id())?.ok_or_else(|| Error::failed("the server is gone at once"))?;
        let (version, lacks, program) = (String::new(), Vec::new(), program.name.clone());
        let server = Server::new(ServerRow { process, version, program, lacks, serving: false }, ours, kept)?;
        // Whatever was rung for stands in the ledger that it has yet to read.
        Ok(Server { born: Some(kept.stats.page().rings()), ..server })
    }

    /// One that runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn new(row: ServerRow, link: Channel, kept: &Kept) -> Result<Server> {
        let gone = || Error::failed(format!("the server, process {}, is gone", row.process.pid));
        let pidfd = process::pidfd(row.process.pid)?.ok_or_else(gone)?;
        let answers = kept.stats.get(crate::stats::Counter::Answers);
        let oom_kills = OomKills::of(row.process.pid);
        let since = Instant::now();
        Ok(Server { row, pidfd, link, since, answers, heard: 0, asking: false, oom_kills, born: None })
    }

    /// Ends it.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}
