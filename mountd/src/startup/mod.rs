//! Startup of a supervisor: with a new mount, or as the successor of another supervisor.
//!
//! ```text
//!   no mount                      ──▶ new_mount: mount(2), INIT, cache      ┐
//!   the supervisor is dead,
//!     its server is alive         ──▶ takeover:  by pidfd_getfd(2)          ├──▶ AcquiredMount ──▶ Supervisor::run
//!   both are dead, a service
//!     manager has the descriptors ──▶ resume:    by LISTEN_FDS              │
//!   execve(2) of another program  ──▶ resume:    by --fds                   ┘
//! ```

mod mountpoint;
mod new_mount;
mod option_conflicts;
pub mod orphan_probe;
mod restore;
mod resume;
mod takeover;

use std::ffi::OsString;
use std::process::ExitCode;

use stencilfs::control::{self, LOG_FILE, MountOptions, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::json_log;
use stencilfs::sys::fuse::device;
use stencilfs::sys::process;
use stencilfs::sys::process::inherited;

use crate::protocol::fds;
use crate::protocol::ledger;
use crate::protocol::named_fds::NamedFds;
use crate::supervisor::callers::{Callers, Starter};
use crate::supervisor::program::Program;
use crate::supervisor::service_manager::ServiceManager;
use crate::supervisor::signals::Signals;
use crate::supervisor::{AcquiredMount, Supervisor};

/// Runs `stencil-mountd supervise`: acquires a mount and supervises it until its end.
pub fn supervise(options: MountOptions) -> ExitCode {
    let starter = Starter { foreground: options.foreground };
    if !options.foreground {
        // A new session, as the caller's terminal may be closed. Fails only for the leader of a process group.
        let _ = rustix::process::setsid();
    }
    let mut callers = Callers::new(Some(starter));
    let fail = |callers: &mut Callers, error: Error| {
        match callers.take_starter() {
            Some(starter) => starter.report(Some(&error)),
            None => log::error!("{error}"),
        }
        ExitCode::from(error.code().exit_code())
    };
    let mut manager = ServiceManager::from_environment();
    let acquired = Signals::new().and_then(|signals| Ok((acquire_mount(options, &mut manager)?, signals)));
    let (acquired, signals) = match acquired {
        Ok(acquired) => acquired,
        Err(error) => return fail(&mut callers, error),
    };
    let (mountpoint, device) =
        (acquired.initial_state.mount.options.mountpoint.clone(), acquired.initial_state.mount.device);
    let drains = acquired.drains;
    if acquired.initial_state.has_served {
        callers.report_serving();
    }
    let ended = match Supervisor::new(acquired, callers, signals, manager) {
        Ok(supervisor) => supervisor.run(),
        Err(error) => Err((error, Callers::default())),
    };
    match ended {
        // This was the mount of another store: the requested mount does not exist yet.
        Ok(()) if drains => ExitCode::FAILURE,
        Ok(()) => ExitCode::SUCCESS,
        Err((error, mut callers)) => {
            new_mount::unmount(&mountpoint, device);
            fail(&mut callers, error)
        }
    }
}

/// Runs `stencil-mountd resume`: continues the supervisor that executed this program in its process.
pub fn resume(args: impl Iterator<Item = OsString>) -> ExitCode {
    let resumed = || -> Result<(Supervisor, Option<_>)> {
        let mut fds = NamedFds::from_args(args)?;
        let caller = fds.take("caller");
        let acquired = resume::from_fds(&mut fds)?;
        let mut callers = Callers::new(None);
        let caller = caller.map(|fd| callers.resume(control::Channel::new(fd)));
        let signals = Signals::new()?;
        process::block_signals(false).map_err(|e| Error::failed("cannot unblock signals").because(e))?;
        Ok((Supervisor::new(acquired, callers, signals, ServiceManager::from_environment())?, caller))
    };
    let ended = resumed().and_then(|(mut supervisor, caller)| {
        let own = Program::own()
            .map_err(|e| Error::failed("cannot open the program file of this process").because(e));
        supervisor.try_program(own, caller);
        supervisor.run().map_err(|(error, _)| error)
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(error.code().exit_code())
        }
    }
}

/// Runs `stencil-mountd check`: checks whether this program can read the ledger on standard input. Writes the outcome
/// to standard output.
pub fn check() -> ExitCode {
    use crate::supervisor::jobs::Outcome;
    let checked = || -> Result<()> { ledger::read(fds::copy(rustix::stdio::stdin())?).map(drop) };
    let (outcome, code) = match checked() {
        Ok(()) => (Outcome::Done, ExitCode::SUCCESS),
        Err(error) => (Outcome::Failed(control::Failure::from(&error)), ExitCode::FAILURE),
    };
    // One write(2), as each write to the socket is one message.
    let text = serde_json::to_vec(&outcome).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    code
}

/// Takes over a mount whose supervisor is dead, or creates a new mount.
fn acquire_mount(options: MountOptions, manager: &mut ServiceManager) -> Result<AcquiredMount> {
    let mountpoint = mountpoint::canonical(&options.mountpoint)?;
    let orphan = control::mounts()?
        .into_iter()
        .find(|m| m.mountpoint == mountpoint && !m.detached && m.orphaned && m.server_pid.is_some());
    let mut stored = NamedFds::from_service_manager()?;
    let names: Vec<String> = stored.names().map(str::to_owned).collect();
    let has_open_connection = stored.of("fuse").iter().any(|fuse| !device::is_over(fuse));
    let found = match orphan {
        Some(orphan) => {
            option_conflicts::same_store(&options, &orphan.store, &orphan.store_id)?;
            Some(takeover::take_over(&orphan)?)
        }
        None if has_open_connection => resume::from_manager(&mut stored, &options)?,
        None => None,
    };
    let is_new = found.is_none();
    let mut acquired = match found {
        Some(acquired) => {
            option_conflicts::warn_about_differences(&options, &acquired.initial_state.mount.options);
            acquired
        }
        None => {
            let acquired = new_mount::prepare(options.clone())?;
            // Descriptors of an earlier mount in the descriptor store must not be confused with those of this mount.
            names.iter().for_each(|name| manager.forget(name));
            acquired
        }
    };
    let facts = &mut acquired.initial_state.mount;
    facts.options.foreground = options.foreground;
    facts.options.log_format = options.log_format;
    json_log::set_mount(&facts.options.mountpoint);
    if !options.foreground {
        leave_terminal(&acquired.resources.record).inspect_err(|_| {
            if is_new {
                new_mount::unmount(&facts.options.mountpoint, facts.device);
            }
        })?;
    }
    lower_oom_score();
    raise_limits();
    Ok(acquired)
}

/// Redirects the log to the directory of the record, and leaves the caller's working directory: all paths are
/// canonical by now.
fn leave_terminal(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> { Ok(rustix::stdio::dup2_stderr(&record.open_log()?)?) };
    open().map_err(|e| Error::io("cannot open the log", &path, e))?;
    std::env::set_current_dir("/").map_err(|e| Error::io("cannot change the working directory to", "/", e))
}

/// Lowers the OOM score of this process and its future servers, on which many guests depend.
fn lower_oom_score() {
    const SCORE: &str = "-900";
    let path = "/proc/self/oom_score_adj";
    let lower =
        std::fs::read_to_string(path).is_ok_and(|now| now.trim().parse::<i32>().is_ok_and(|n| n > -900));
    if lower && let Err(e) = std::fs::write(path, SCORE) {
        log::debug!("cannot lower the OOM score: {e}");
    }
}

/// Raises the resource limits: each backing is a large file with a descriptor here and in the server, more than the
/// limits of a login session allow.
fn raise_limits() {
    for error in inherited::raise_limits() {
        log::warn!("cannot raise a limit: {error}");
    }
}
