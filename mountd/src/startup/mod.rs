//! How a supervisor begins: with a new mount, or in the place of another supervisor.
//!
//! ```text
//!   no mount                      ──▶ new_mount: mount(2), INIT, cache      ┐
//!   the supervisor is dead,
//!     its server lives            ──▶ takeover:  by pidfd_getfd(2)          ├──▶ Taken ──▶ Supervisor::run
//!   both are dead, a service
//!     manager has the descriptors ──▶ resume:    by LISTEN_FDS              │
//!   becomes another program       ──▶ resume:    by --fds                   ┘
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
use crate::supervisor::{Supervisor, Taken};

/// `stencil-mountd supervise`.
pub fn supervise(options: MountOptions) -> ExitCode {
    let starter = Starter { foreground: options.foreground };
    if !options.foreground {
        // A new session: the caller's terminal may go away. Fails only for a process that is a leader already.
        let _ = rustix::process::setsid();
    }
    let mut callers = Callers::new(Some(starter));
    let fail = |callers: &mut Callers, error: Error| {
        match callers.take_starter() {
            Some(starter) => starter.tell(Some(&error)),
            None => log::error!("{error}"),
        }
        ExitCode::from(error.code().exit_code())
    };
    let mut manager = ServiceManager::from_environment();
    let taken = Signals::new().and_then(|signals| Ok((take(options, &mut manager)?, signals)));
    let (taken, signals) = match taken {
        Ok(taken) => taken,
        Err(error) => return fail(&mut callers, error),
    };
    let (mountpoint, device) = (taken.begin.mount.options.mountpoint.clone(), taken.begin.mount.device);
    let drains = taken.drains;
    if taken.begin.has_served {
        callers.served();
    }
    let ended = match Supervisor::new(taken, callers, signals, manager) {
        Ok(supervisor) => supervisor.run(),
        Err(error) => Err((error, Callers::default())),
    };
    match ended {
        // The mount that was asked for is yet to be made.
        Ok(()) if drains => ExitCode::FAILURE,
        Ok(()) => ExitCode::SUCCESS,
        Err((error, mut callers)) => {
            new_mount::unmount(&mountpoint, device);
            fail(&mut callers, error)
        }
    }
}

/// `stencil-mountd resume`: what a supervisor is after it has become another program.
pub fn resume(args: impl Iterator<Item = OsString>) -> ExitCode {
    let resumed = || -> Result<(Supervisor, Option<_>)> {
        let mut fds = NamedFds::from_args(args)?;
        let caller = fds.take("caller");
        let taken = resume::from_fds(&mut fds)?;
        let mut callers = Callers::new(None);
        let caller = caller.map(|fd| callers.resume(control::Channel::new(fd)));
        let signals = Signals::new()?;
        process::block_signals(false).map_err(|e| Error::failed("cannot unblock signals").because(e))?;
        Ok((Supervisor::new(taken, callers, signals, ServiceManager::from_environment())?, caller))
    };
    let ended = resumed().and_then(|(mut supervisor, caller)| {
        let own = Program::own().map_err(|e| Error::failed("cannot open this program").because(e));
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

/// `stencil-mountd check`: whether this program can continue from the ledger on standard input. Writes the outcome to
/// standard output.
pub fn check() -> ExitCode {
    use crate::supervisor::jobs::Outcome;
    let checked = || -> Result<()> { ledger::read(fds::copy(rustix::stdio::stdin())?).map(drop) };
    let (outcome, code) = match checked() {
        Ok(()) => (Outcome::Done, ExitCode::SUCCESS),
        Err(error) => (Outcome::Failed(control::Failure::from(&error)), ExitCode::FAILURE),
    };
    // One write(2): the socket carries whole messages.
    let text = serde_json::to_vec(&outcome).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    code
}

/// A new mount, or a mount whose supervisor is dead.
fn take(options: MountOptions, manager: &mut ServiceManager) -> Result<Taken> {
    let mountpoint = mountpoint::canonical(&options.mountpoint)?;
    let left = control::mounts()?
        .into_iter()
        .find(|m| m.mountpoint == mountpoint && !m.detached && m.orphaned && m.server_pid.is_some());
    let mut stored = NamedFds::from_service_manager()?;
    let names: Vec<String> = stored.names().map(str::to_owned).collect();
    let living = stored.of("fuse").iter().any(|fuse| !device::is_over(fuse));
    let found = match left {
        Some(left) => {
            option_conflicts::same_store(&options, &left.store, &left.store_id)?;
            Some(takeover::take_over(&left)?)
        }
        None if living => resume::from_manager(&mut stored, &options)?,
        None => None,
    };
    let is_new = found.is_none();
    let mut taken = match found {
        Some(taken) => {
            option_conflicts::warn_about_differences(&options, &taken.begin.mount.options);
            taken
        }
        None => {
            let taken = new_mount::prepare(options.clone())?;
            // Descriptors of an earlier mount must not be taken for those of this mount.
            names.iter().for_each(|name| manager.forget(name));
            taken
        }
    };
    let facts = &mut taken.begin.mount;
    facts.options.foreground = options.foreground;
    if !options.foreground {
        leave_terminal(&taken.resources.record).inspect_err(|_| {
            if is_new {
                new_mount::unmount(&facts.options.mountpoint, facts.device);
            }
        })?;
    }
    lower_oom_score();
    raise_limits();
    Ok(taken)
}

/// Logs to the directory of the record, and leaves the caller's working directory: each path is canonical by now.
fn leave_terminal(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> { Ok(rustix::stdio::dup2_stderr(&record.open_log()?)?) };
    open().map_err(|e| Error::io("cannot write the log", &path, e))?;
    std::env::set_current_dir("/").map_err(|e| Error::io("cannot enter", "/", e))
}

/// Many guests depend on this process and its servers: the OOM killer should choose other processes first.
fn lower_oom_score() {
    const SCORE: &str = "-900";
    let path = "/proc/self/oom_score_adj";
    let lower =
        std::fs::read_to_string(path).is_ok_and(|now| now.trim().parse::<i32>().is_ok_and(|n| n > -900));
    if lower && let Err(e) = std::fs::write(path, SCORE) {
        log::debug!("cannot lower the OOM score: {e}");
    }
}

/// Each backing is a descriptor here and in the server, and a large file: the limits of the caller's session are too low.
fn raise_limits() {
    for error in inherited::raise_limits() {
        log::warn!("cannot raise a limit: {error}");
    }
}
