//! How a supervisor begins: with a new mount, or in the place of another supervisor.
//!
//! ```text
//!   nothing there            ──▶ prepare: mount, INIT, cache          ┐
//!   its supervisor is dead,
//!     its server lives       ──▶ adopt:  by pidfd_getfd               ├──▶ Kept, Backings, Server ──▶ Supervisor::run
//!   both are dead, a service
//!     manager kept the rest  ──▶ resume: by LISTEN_FDS                │
//!   becomes a new program    ──▶ resume: by --fds                     ┘
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
use crate::handed::Fds;
use crate::kept::{self, Kept, Ledger, Program};
use crate::notify::Notify;
use crate::signals::Signals;
use crate::stats::Stats;
use crate::supervisor::{Server, Supervisor};

/// A mount, from its begin or from where another supervisor left it.
pub struct Taken {
    /// What is kept for it.
    pub kept: Kept,
    /// Its backings.
    pub backings: Backings,
    /// Its server, and that one's table of requests.
    pub server: Option<(Server, Option<OwnedFd>)>,
    /// Servers that were ended before and may live yet.
    pub leaving: Vec<ProcessId>,
    /// Templates that nobody may find or open.
    pub condemned: Vec<CondemnedRow>,
    /// It is to leave the tree at once, and to end with its last mapping.
    pub drains: bool,
}

/// `stencil-mountd supervise`.
pub fn supervise(options: MountOptions) -> ExitCode {
    let starter = Starter { foreground: options.foreground };
    if !options.foreground {
        // A session of its own: the caller's terminal may go. It fails only for what is a leader already.
        let _ = rustix::process::setsid();
    }
    let mut callers = Callers::new(Some(starter));
    let fail = |callers: &mut Callers, error: Error| {
        match callers.starter() {
            Some(starter) => starter.tell(Some(&error)),
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
    let (mountpoint, device) = (taken.kept.options.mountpoint.clone(), taken.kept.device);
    let drains = taken.drains;
    let mut supervisor = Supervisor::new(taken, callers, signals, notify);
    if drains {
        supervisor.drain();
    }
    match supervisor.run() {
        // What was asked for is still to be mounted.
        Ok(()) if drains => ExitCode::FAILURE,
        Ok(()) => ExitCode::SUCCESS,
        Err((error, mut callers)) => {
            prepare::unmount(&mountpoint, device);
            fail(&mut callers, error)
        }
    }
}

/// `stencil-mountd resume`: what a supervisor is after it became another program.
pub fn resume(args: impl Iterator<Item = OsString>) -> ExitCode {
    let resumed = || -> Result<(Supervisor, Option<u64>)> {
        let mut fds = Fds::from_args(args)?;
        let caller = fds.take("caller");
        let taken = resume::from_fds(&mut fds)?;
        let mut callers = Callers::new(None);
        let caller = caller.map(|fd| callers.resume(control::Channel::new(fd)));
        let signals = Signals::new()?;
        process::hold_signals(false).map_err(|e| Error::failed("cannot hear signals").because(e))?;
        Ok((Supervisor::new(taken, callers, signals, Notify::new()), caller))
    };
    let ended = resumed().and_then(|(mut supervisor, caller)| {
        let own = Program::own().map_err(|e| Error::failed("cannot open this program").because(e));
        if let Err(error) = own.and_then(|program| supervisor.try_server(program, caller)) {
            // The server goes on, and now has a supervisor that can say why there is no other.
            log::error!("{error}");
            supervisor.callers.answer(caller, Err(error));
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

/// `stencil-mountd check`: whether this program could go on with the ledger on standard input; says so on standard
/// output.
pub fn check() -> ExitCode {
    use crate::jobs::Outcome;
    let checked = || -> Result<()> { kept::read(kept::copy(rustix::stdio::stdin())?).map(drop) };
    let (outcome, code) = match checked() {
        Ok(()) => (Outcome::Done, ExitCode::SUCCESS),
        Err(error) => (Outcome::Failed(control::Failure::from(&error)), ExitCode::FAILURE),
    };
    // One write: the other end takes whole messages.
    let text = serde_json::to_vec(&outcome).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stdout(), &text);
    code
}

/// A new mount, or one whose supervisor is dead.
fn take(options: MountOptions, notify: &mut Notify) -> Result<Taken> {
    let mountpoint = checks::canonical(&options.mountpoint)?;
    let left = control::mounts()?
        .into_iter()
        .find(|m| m.mountpoint == mountpoint && !m.detached && m.orphaned && m.server_pid.is_some());
    let mut stored = Fds::from_service_manager()?;
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
            asked::warn_of_others(&options, &taken.kept.options);
            taken
        }
        None => {
            let taken = prepare::prepare(options.clone())?;
            // What is left of an earlier mount is not to be taken for this one's.
            names.iter().for_each(|name| notify.forget(name));
            taken
        }
    };
    taken.kept.options.foreground = options.foreground;
    if !options.foreground {
        leave_terminal(&taken.kept.record).inspect_err(|_| {
            if is_new {
                prepare::unmount(&taken.kept.options.mountpoint, taken.kept.device);
            }
        })?;
    }
    lower_oom_score();
    raise_limits();
    Ok(taken)
}

/// What a ledger's supervisor kept, from the descriptors that were found. `record` is locked by the caller.
fn restore(snapshot: Snapshot, record: RecordDir, found: Found) -> Result<(Kept, Backings)> {
    let counters = SharedCounters::map(found.counters)
        .map_err(|e| Error::failed("the counters cannot be mapped").because(e))?;
    let listener = match found.listener {
        Some(listener) => listener,
        None => crate::control::open(&record)?,
    };
    let mut files = found.files;
    let backings = Backings::restore(snapshot.backings, |row: &BackingRow| {
        let at = files.iter().position(|fd| kept::is(fd, row.identity))?;
        Some(files.swap_remove(at))
    });
    let kept = Kept {
        options: snapshot.options,
        store_id: snapshot.store_id,
        device: snapshot.device,
        init: snapshot.init,
        reply: snapshot.reply,
        chosen: snapshot.chosen,
        restarts: snapshot.restarts,
        // Another process was not asked for the end yet.
        terminations: if snapshot.supervisor == ProcessId::me()? { snapshot.terminations } else { 0 },
        fuse: found.fuse,
        stats: Stats::new(counters),
        record,
        listener,
        program: found.program,
        previous: None,
        ledger: found.ledger,
    };
    Ok((kept, backings))
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

/// Logs to the record's folder, and holds the caller's directory no longer: every path is canonical by now.
fn leave_terminal(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> { Ok(rustix::stdio::dup2_stderr(&record.open_log()?)?) };
    open().map_err(|e| Error::io("cannot write the log", &path, e))?;
    std::env::set_current_dir("/").map_err(|e| Error::io("cannot enter", "/", e))
}

/// Many guests hang on this process and its servers: others are to be killed for memory first.
fn lower_oom_score() {
    const SCORE: &str = "-900";
    let path = "/proc/self/oom_score_adj";
    let lower =
        std::fs::read_to_string(path).is_ok_and(|now| now.trim().parse::<i32>().is_ok_and(|n| n > -900));
    if lower && let Err(e) = std::fs::write(path, SCORE) {
        log::debug!("cannot lower the OOM score: {e}");
    }
}

/// Each backing is a descriptor here and in the server, and a large file; both outlive the session that started them.
fn raise_limits() {
    for error in inherited::raise_limits() {
        log::warn!("cannot raise a limit (setrlimit): {error}");
    }
}
