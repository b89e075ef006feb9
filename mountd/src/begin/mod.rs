//! Startup of a supervisor: with a new mount, or in the place of another supervisor.
//!
//! ```text
//!   nothing is mounted       ──▶ prepare: mount, INIT, cache          ┐
//!   supervisor dead,
//!     server alive           ──▶ adopt:  by pidfd_getfd               ├──▶ StartedMount ──▶ Supervisor::run
//!   both dead, descriptors
//!     in the service manager ──▶ resume: by LISTEN_FDS                │
//!   exec of a new program    ──▶ resume: by --fds                     ┘
//! ```

mod adopt;
mod asked;
pub mod cache;
mod checks;
mod prepare;
mod resume;
pub mod unrecorded;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use stencilfs::control::{self, BackingRow, CondemnedRow, LOG_FILE, MountOptions, RecordDir, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::sys::process::{self, ProcessId};
use stencilfs::sys::{fuse_dev, inherited};

use crate::backings::Backings;
use crate::control::{Callers, Starter};
use crate::handed::NamedFds;
use crate::kept::{self, Ledger, MountState, Program};
use crate::notify::Notify;
use crate::signals::Signals;
use crate::stats::Stats;
use crate::supervisor::{Server, Supervisor};

/// A mount, new or taken over from another supervisor.
pub struct StartedMount {
    /// Mount state.
    pub state: MountState,
    /// Backings.
    pub backings: Backings,
    /// The server, with its table of pending requests.
    pub server: Option<(Server, Option<OwnedFd>)>,
    /// Servers that were killed earlier and may still be alive.
    pub leaving: Vec<ProcessId>,
    /// Condemned templates.
    pub condemned: Vec<CondemnedRow>,
    /// True if the mount must be detached at once and end with its last mapping.
    pub drains: bool,
}

/// Runs `stencil-mountd supervise`.
pub fn supervise(options: MountOptions) -> ExitCode {
    let starter = Starter { foreground: options.foreground };
    if !options.foreground {
        // A new session, as the caller's terminal may be closed. setsid(2) fails only for a process group leader.
        let _ = rustix::process::setsid();
    }
    let mut callers = Callers::new(Some(starter));
    let fail = |callers: &mut Callers, error: Error| {
        match callers.starter() {
            Some(starter) => starter.report(Some(&error)),
            None => log::error!("{error}"),
        }
        ExitCode::from(error.code().exit_code())
    };
    let mut notify = Notify::new();
    let begun = Signals::new().and_then(|signals| Ok((take(options, &mut notify)?, signals)));
    let (taken, signals) = match begun {
        Ok(begun) => begun,
        Err(error) => return fail(&mut callers, error),
    };
    let (mountpoint, device) = (taken.state.options.mountpoint.clone(), taken.state.device);
    let drains = taken.drains;
    let mut supervisor = Supervisor::new(taken, callers, signals, notify);
    if drains {
        supervisor.drain();
    }
    match supervisor.run() {
        // The requested mount still has to be made: a failure makes the service manager start the service again.
        Ok(()) if drains => ExitCode::FAILURE,
        Ok(()) => ExitCode::SUCCESS,
        Err((error, mut callers)) => {
            prepare::unmount(&mountpoint, device);
            fail(&mut callers, error)
        }
    }
}

/// Runs `stencil-mountd resume`, the continuation of a supervisor that has executed another program.
pub fn resume(args: impl Iterator<Item = OsString>) -> ExitCode {
    let resumed = || -> Result<(Supervisor, Option<u64>)> {
        let mut fds = NamedFds::from_args(args)?;
        let caller = fds.take("caller");
        let taken = resume::from_fds(&mut fds)?;
        let mut callers = Callers::new(None);
        let caller = caller.map(|fd| callers.resume(control::Channel::new(fd)));
        let signals = Signals::new()?;
        process::hold_signals(false).map_err(|e| Error::failed("cannot unblock signals").because(e))?;
        Ok((Supervisor::new(taken, callers, signals, Notify::new()), caller))
    };
    let ended = resumed().and_then(|(mut supervisor, caller)| {
        let own = Program::own().map_err(|e| Error::failed("cannot open this program").because(e));
        if let Err(error) = own.and_then(|program| supervisor.start_candidate(program, caller)) {
            // The old server continues, and this supervisor can report why there is no new server.
            log::error!("{error}");
            supervisor.callers.reply_done(caller, Err(error));
        }
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

/// Runs `stencil-mountd check`: checks whether this program can take over with the ledger on standard input, and writes
/// the outcome to standard output.
pub fn check() -> ExitCode {
    use crate::jobs::Outcome;
    let checked = || -> Result<()> { kept::read(kept::duplicate(rustix::stdio::stdin())?).map(drop) };
    let (outcome, code) = match checked() {
        Ok(()) => (Outcome::Done, ExitCode::SUCCESS),
        Err(error) => (Outcome::Failed(control::Failure::from(&error)), ExitCode::FAILURE),
    };
    // One write, as the other end reads whole packets.
    let text = serde_json::to_vec(&outcome).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    code
}

/// Takes over a mount whose supervisor is dead, or makes a new one.
fn take(options: MountOptions, notify: &mut Notify) -> Result<StartedMount> {
    let mountpoint = checks::canonical(&options.mountpoint)?;
    let left = control::mounts()?
        .into_iter()
        .find(|m| m.mountpoint == mountpoint && !m.detached && m.orphaned && m.server_pid.is_some());
    let mut stored = NamedFds::from_service_manager()?;
    let names: Vec<String> = stored.names().map(str::to_owned).collect();
    let living = stored.of("fuse").iter().any(|fuse| !fuse_dev::is_over(fuse));
    let found = match left {
        Some(left) => {
            asked::same_store(&options, &left.store, left.store_id.as_deref())?;
            Some(adopt::adopt(&left)?)
        }
        None if living => resume::from_manager(&mut stored, &options)?,
        None => None,
    };
    let is_new = found.is_none();
    let mut taken = match found {
        Some(taken) => {
            asked::warn_about_differences(&options, &taken.state.options);
            taken
        }
        None => {
            let taken = prepare::prepare(options.clone())?;
            // Descriptors that the service manager holds of an earlier mount must not be mixed up with those of this
            // one.
            names.iter().for_each(|name| notify.forget(name));
            taken
        }
    };
    taken.state.options.foreground = options.foreground;
    if !options.foreground {
        leave_terminal(&taken.state.record).inspect_err(|_| {
            if is_new {
                prepare::unmount(&taken.state.options.mountpoint, taken.state.device);
            }
        })?;
    }
    lower_oom_score();
    raise_limits();
    Ok(taken)
}

/// Restores the mount state and the backings from a ledger and the descriptors that were found. The caller has locked
/// `record`.
fn restore(snapshot: Snapshot, record: RecordDir, found: Found) -> Result<(MountState, Backings)> {
    let counters = SharedCounters::map(found.counters)
        .map_err(|e| Error::failed("cannot map the counters page").because(e))?;
    let listener = match found.listener {
        Some(listener) => listener,
        None => crate::control::open(&record)?,
    };
    let mut files = found.files;
    let backings = Backings::restore(snapshot.backings, |row: &BackingRow| {
        let at = files.iter().position(|fd| kept::has_identity(fd, row.identity))?;
        Some(files.swap_remove(at))
    });
    let state = MountState {
        options: snapshot.options,
        store_id: snapshot.store_id,
        device: snapshot.device,
        init: snapshot.init,
        reply: snapshot.reply,
        chosen: snapshot.chosen,
        restarts: snapshot.restarts,
        // A new process has not received the termination signals of its predecessor.
        terminations: if snapshot.supervisor == ProcessId::me()? { snapshot.terminations } else { 0 },
        fuse: found.fuse,
        stats: Stats::new(counters),
        record,
        listener,
        program: found.program,
        previous: None,
        ledger: found.ledger,
    };
    Ok((state, backings))
}

/// Descriptors of another supervisor.
struct Found {
    fuse: OwnedFd,
    counters: OwnedFd,
    ledger: Ledger,
    program: Program,
    listener: Option<OwnedFd>,
    files: Vec<OwnedFd>,
}

/// Redirects standard error to the log in the record's directory, and leaves the caller's working directory: all paths
/// are canonical by now.
fn leave_terminal(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> { Ok(rustix::stdio::dup2_stderr(&record.open_log()?)?) };
    open().map_err(|e| Error::io("cannot open the log", &path, e))?;
    std::env::set_current_dir("/").map_err(|e| Error::io("cannot change the directory to", "/", e))
}

/// Lowers the OOM score: many guests depend on this process and its servers, so other processes must be killed first.
fn lower_oom_score() {
    const SCORE: &str = "-900";
    let path = "/proc/self/oom_score_adj";
    let lower =
        std::fs::read_to_string(path).is_ok_and(|now| now.trim().parse::<i32>().is_ok_and(|n| n > -900));
    if lower && let Err(e) = std::fs::write(path, SCORE) {
        log::debug!("cannot lower the OOM score: {e}");
    }
}

/// Raises the limits on descriptors and file size, as far as this process may: each backing is a large file with a
/// descriptor in supervisor and server, and both outlive the session that started them.
fn raise_limits() {
    for error in inherited::raise_limits() {
        log::warn!("cannot raise a limit (setrlimit): {error}");
    }
}
