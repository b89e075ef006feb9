//! Server processes: start, kill, inspect.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::control::Channel;
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::cgroup::OomKills;
use stencilfs::sys::process::{self, Ended, ProcessId};

use super::event::Role;
use super::machine::Backings;
use super::program::Program;
use super::resources::Resources;
use crate::protocol::{BESIDE, named_fds};

/// A process whose descriptors are closed has exited within this time; readers must not wait longer.
const EXIT_LIMIT: Duration = Duration::from_millis(2);

/// Variables of the service manager, which are for the supervisor alone.
const MANAGER_VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// A server process, and the socket to it.
#[derive(Debug)]
pub struct ServerProcess {
    /// The process.
    pub process: ProcessId,
    /// Readable once it has exited.
    pub pidfd: OwnedFd,
    /// The socket; none for a server that leaves.
    pub link: Option<Channel>,
    /// Count of OOM kills of its control group when it was started.
    oom_kills: Option<OomKills>,
}

impl ServerProcess {
    /// Starts a server. It inherits each descriptor that a new supervisor would need, under its number, and reads
    /// everything else from the ledger.
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
                .remedy("check the limits of processes and open files")
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
        for variable in MANAGER_VARIABLES {
            command.env_remove(variable);
        }
        // A process group of its own: Ctrl-C at the supervisor's terminal does not reach it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = process::inherit_all(&mut command, &inherited)
            .spawn()
            .map_err(|e| Error::io("cannot start a server", &program.path, e))?;
        // A child that has exited keeps its number until it is reaped.
        let gone = || Error::failed("the server exited at once");
        let process = ProcessId::of(child.id())?.ok_or_else(gone)?;
        let pidfd = process::pidfd(child.id())?.ok_or_else(gone)?;
        Ok(ServerProcess { process, pidfd, link: Some(ours), oom_kills: OomKills::of(child.id()) })
    }

    /// A server that runs.
    ///
    /// # Errors
    /// Returns an error if it does not.
    pub fn running(process: ProcessId, link: Option<Channel>) -> Result<ServerProcess> {
        let gone = || Error::failed(format!("server process {} does not exist", process.pid));
        let pidfd = process.open()?.ok_or_else(gone)?;
        Ok(ServerProcess { process, pidfd, link, oom_kills: OomKills::of(process.pid) })
    }

    /// Kills it.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// How it ended, and whether the OOM killer struck meanwhile. A process that runs is not waited for.
    pub fn end(&self) -> (Option<Ended>, bool) {
        (process::reap(&self.pidfd, EXIT_LIMIT), self.oom_kills.as_ref().is_some_and(OomKills::has_increased))
    }
}
