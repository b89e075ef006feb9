//! Servers, as the supervisor sees them, and their start.

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
use crate::kept::{MountState, Program};
use crate::server::BESIDE;

/// A server process, which serves the kernel or is starting.
#[derive(Debug)]
pub struct Server {
    /// Its process and the data that it has reported.
    pub row: ServerRow,
    /// Becomes readable when the process exits.
    pub pidfd: OwnedFd,
    /// The supervisor's end of the link.
    pub link: Channel,
    /// Time of its start or takeover.
    pub since: Instant,
    /// Value of the `answers` counter at that time.
    pub answers: u64,
    /// Number of its last request that was handled: a repeated request is answered once.
    pub last_request: u64,
    /// True while a job works on its request.
    pub busy: bool,
    /// OOM kills in its control group before that time.
    pub oom_kills: Option<OomKills>,
    /// Number of rings of the bell before its start; `None` if unknown.
    pub rings_at_start: Option<u32>,
}

impl Server {
    /// Starts a server, `beside` another one that serves or in its place. The server inherits all descriptors that a
    /// new supervisor would need, under the same numbers, and reads everything else from the ledger.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    pub fn start(state: &MountState, backings: &Backings, program: &Program, beside: bool) -> Result<Server> {
        let fail = |e: std::io::Error| {
            Error::failed("cannot start a server")
                .because(e)
                .remedy("check the limits on processes and open files")
        };
        let (ours, theirs) = Channel::pair().map_err(fail)?;
        let ledger = state.ledger.read_only().map_err(fail)?;
        let named = [
            ("fuse", state.fuse.as_fd()),
            ("link", theirs.as_fd()),
            ("peer", ours.as_fd()),
            ("ledger", ledger.as_fd()),
            ("counters", state.stats.page().fd().as_fd()),
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
            .arg(&state.options.mountpoint);
        for word in
            ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"]
        {
            command.env_remove(word);
        }
        // Its own process group: Ctrl-C at the supervisor's terminal does not reach the server.
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = process::inherit_all(&mut command, &inherited)
            .spawn()
            .map_err(|e| Error::io("cannot start a server", &program.name, e))?;
        let process = ProcessId::of(child.id())?.ok_or_else(|| Error::failed("the server exited at once"))?;
        let (version, lacks, program) = (String::new(), Vec::new(), program.name.clone());
        let server =
            Server::new(ServerRow { process, version, program, lacks, serving: false }, ours, state)?;
        // The server has yet to read the ledger, so it will see all changes up to this ring.
        Ok(Server { rings_at_start: Some(state.stats.page().rings()), ..server })
    }

    /// Wraps a running server.
    ///
    /// # Errors
    /// Returns an error if the process has exited.
    pub fn new(row: ServerRow, link: Channel, state: &MountState) -> Result<Server> {
        let gone = || Error::failed(format!("the server, process {}, has exited", row.process.pid));
        let pidfd = process::pidfd(row.process.pid)?.ok_or_else(gone)?;
        let answers = state.stats.get(crate::stats::Counter::Answers);
        let oom_kills = OomKills::of(row.process.pid);
        let since = Instant::now();
        Ok(Server {
            row,
            pidfd,
            link,
            since,
            answers,
            last_request: 0,
            busy: false,
            oom_kills,
            rings_at_start: None,
        })
    }

    /// Kills the server.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}
