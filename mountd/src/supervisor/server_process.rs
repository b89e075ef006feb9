//! Server processes: starting, killing, and reading their exit status.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::control::Channel;
use stencilfs::error::{Error, Result};
use stencilfs::json_log;
use stencilfs::sys::process::cgroup::OomKills;
use stencilfs::sys::process::{self, Ended, ProcessId};

use super::event::Role;
use super::machine::Backings;
use super::program::Program;
use super::resources::Resources;
use crate::protocol::{BESIDE, named_fds};

/// Longest wait for the exit status of a server whose socket is closed. Short, as readers of the mount wait meanwhile.
const EXIT_TIMEOUT: Duration = Duration::from_millis(2);

/// Environment variables of the service manager. A server does not inherit them: it must not notify the manager.
const MANAGER_VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// A server process and its socket.
#[derive(Debug)]
pub struct ServerProcess {
    /// The process.
    pub process: ProcessId,
    /// Becomes readable when the process exits.
    pub pidfd: OwnedFd,
    /// The socket; `None` for a server that was killed.
    pub link: Option<Channel>,
    /// Number of OOM kills in the control group of the server when it was started.
    oom_kills: Option<OomKills>,
}

impl ServerProcess {
    /// Starts a server. The server inherits all descriptors that a new supervisor would need, under the same numbers,
    /// and reads everything else from the ledger.
    ///
    /// # Errors
    /// Returns an error if the process cannot be started.
    pub fn start(
        resources: &Resources,
        backings: &Backings,
        program: &Program,
        role: Role,
        mountpoint: &std::path::Path,
    ) -> Result<ServerProcess> {
        let fail = |e: std::io::Error| {
            Error::failed("cannot start a server")
                .because(e)
                .hint("check the limits of processes and open files")
        };
        let (ours, theirs) = Channel::pair().map_err(fail)?;
        let ledger = resources.ledger.read_only().map_err(fail)?;
        let named = [
            ("fuse", resources.fuse.as_fd()),
            ("link", theirs.as_fd()),
            ("peer", ours.as_fd()),
            ("ledger", ledger.as_fd()),
            ("counters", resources.stats.page().fd().as_fd()),
            ("program", program.file.as_fd()),
        ];
        let backings = backings.registered().map(|(_, file)| file.as_fd());
        let inherited: Vec<BorrowedFd<'_>> = named.iter().map(|(_, fd)| *fd).chain(backings).collect();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command
            .arg0("stencil-mountd")
            .arg("serve")
            .args((role == Role::Candidate).then_some(BESIDE))
            .args([&named_fds::argument(&named), "--"])
            .arg(mountpoint);
        command.env(json_log::VARIABLE, json_log::format().name());
        for variable in MANAGER_VARIABLES {
            command.env_remove(variable);
        }
        // A separate process group: the terminal of the supervisor sends no SIGINT to the server on Ctrl-C.
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = process::inherit_all(&mut command, &inherited)
            .spawn()
            .map_err(|e| Error::io("cannot start a server", &program.path, e))?;
        // The PID of a child cannot be reused before the child is reaped.
        let gone = || Error::failed("the server exited immediately after its start");
        let process = ProcessId::of(child.id())?.ok_or_else(gone)?;
        let pidfd = process::pidfd(child.id())?.ok_or_else(gone)?;
        Ok(ServerProcess { process, pidfd, link: Some(ours), oom_kills: OomKills::of(child.id()) })
    }

    /// Opens a server process that was started by another supervisor or by an earlier program of this process.
    ///
    /// # Errors
    /// Returns an error if the process does not exist.
    pub fn open(process: ProcessId, link: Option<Channel>) -> Result<ServerProcess> {
        let gone = || Error::failed(format!("server process {} does not exist", process.pid));
        let pidfd = process.open()?.ok_or_else(gone)?;
        Ok(ServerProcess { process, pidfd, link, oom_kills: OomKills::of(process.pid) })
    }

    /// Sends SIGKILL to the process.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Returns the exit status of the server, and whether the OOM killer has killed a process in the control group
    /// since the start of the server.
    /// Returns `None` for a process that is still running after [`EXIT_TIMEOUT`] or is not a child.
    pub fn exit_status(&self) -> (Option<Ended>, bool) {
        (
            process::reap(&self.pidfd, EXIT_TIMEOUT),
            self.oom_kills.as_ref().is_some_and(OomKills::has_increased),
        )
    }
}
