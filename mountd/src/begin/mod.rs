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
pub mod cache;
mod checks;
mod prepare;
mod resume;

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use stencilfs::control::{self, BackingRow, LOG_FILE, MountOptions, RecordDir, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::sys::process;

use crate::backings::Backings;
use crate::control::{Callers, Starter};
use crate::kept::{self, Kept, Ledger, Program};
use crate::notify::Notify;
use crate::stats::Stats;
use crate::supervisor::{Server, Supervisor};

/// A mount, from its begin or from where another supervisor left it.
struct Taken {
    kept: Kept,
    backings: Backings,
    server: Option<(Server, Option<OwnedFd>)>,
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
    let begun = signals().and_then(|signals| Ok((take(options)?, signals)));
    let (taken, signals) = match begun {
        Ok(begun) => begun,
        Err(error) => return fail(&mut callers, error),
    };
    let (mountpoint, device) = (taken.kept.options.mountpoint.clone(), taken.kept.device);
    let supervisor =
        Supervisor::new(taken.kept, taken.backings, taken.server, callers, signals, Notify::new());
    match supervisor.run() {
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
        let signals = signals()?;
        process::hold_signals(false).map_err(|e| Error::failed("cannot hear signals").because(e))?;
        Ok((
            Supervisor::new(taken.kept, taken.backings, taken.server, callers, signals, Notify::new()),
            caller,
        ))
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
    let checked = || -> Result<()> {
        let fail = |e: std::io::Error| Error::failed("no ledger was handed on").because(e);
        let (_, text) =
            Ledger::open(rustix::stdio::stdin().try_clone_to_owned().map_err(fail)?).map_err(fail)?;
        kept::parse(&text).map(drop)
    };
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
fn take(options: MountOptions) -> Result<Taken> {
    let mountpoint = checks::canonical(&options.mountpoint)?;
    let left =
        control::mounts()?.into_iter().find(|m| m.mountpoint == mountpoint && !m.detached && m.orphaned);
    let mut stored = Fds::from_service_manager()?;
    let mut taken = match (left, stored.has("fuse")) {
        (Some(left), _) => adopt::adopt(&left),
        (None, true) => resume::from_fds(&mut stored),
        (None, false) => prepare::prepare(options.clone()),
    }?;
    taken.kept.options.foreground = options.foreground;
    if !options.foreground {
        log_to(&taken.kept.record)?;
        // Every path is canonical by now; the caller's directory must not be held.
        std::env::set_current_dir("/").map_err(|e| Error::io("cannot enter", "/", e))?;
    }
    lower_oom_score();
    raise_descriptor_limit();
    Ok(taken)
}

/// Descriptors with names.
#[derive(Debug, Default)]
pub struct Fds(HashMap<String, Vec<OwnedFd>>);

impl Fds {
    /// Those that `--fds=NAME:NUMBER,…` names.
    ///
    /// # Errors
    /// When one of them is not open.
    pub fn from_args(args: impl Iterator<Item = OsString>) -> Result<Fds> {
        let bad = || Error::usage("it is started by a supervisor only, which hands it descriptors");
        let mut fds = Fds::default();
        for arg in args.take_while(|arg| arg != "--") {
            let names = arg.to_str().and_then(|a| a.strip_prefix("--fds=")).ok_or_else(bad)?;
            for item in names.split(',').filter(|item| !item.is_empty()) {
                let (name, number) = item.split_once(':').ok_or_else(bad)?;
                fds.add(name, number.parse().map_err(|_| bad())?)?;
            }
        }
        Ok(fds)
    }

    /// Those that a service manager kept, as sd_listen_fds_with_names(3) finds them.
    ///
    /// # Errors
    /// When one of them is not open.
    fn from_service_manager() -> Result<Fds> {
        const FIRST: i32 = 3;
        let word = |name| std::env::var(name).unwrap_or_default();
        let mut fds = Fds::default();
        if word("LISTEN_PID") == std::process::id().to_string() {
            let count: usize = word("LISTEN_FDS").parse().unwrap_or(0);
            let names = word("LISTEN_FDNAMES");
            let names = names.split(':').chain(std::iter::repeat("")).take(count);
            for (name, number) in names.zip(FIRST..) {
                fds.add(name, number)?;
            }
        }
        Ok(fds)
    }

    fn add(&mut self, name: &str, number: i32) -> Result<()> {
        let fd = stencilfs::sys::descriptor::take(number).map_err(|e| {
            Error::failed(format!("descriptor {number} ({name}) was not handed to this program")).because(e)
        })?;
        self.0.entry(name.to_owned()).or_default().push(fd);
        Ok(())
    }

    /// True when there is one of that name.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The one of that name.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.0.remove(name).and_then(|mut all| all.pop())
    }

    /// The one of that name, which must be there.
    ///
    /// # Errors
    /// Names it.
    pub fn need(&mut self, name: &str) -> Result<OwnedFd> {
        self.take(name)
            .ok_or_else(|| Error::failed(format!("no descriptor '{name}' was handed to this program")))
    }

    /// All that are left, whatever their names.
    pub fn rest(&mut self) -> Vec<OwnedFd> {
        self.0.drain().flat_map(|(_, fds)| fds).collect()
    }
}

/// What a ledger's supervisor kept, from the descriptors that were found. `record` is locked by the caller.
fn restore(snapshot: Snapshot, record: RecordDir, found: Found) -> Result<(Kept, Backings)> {
    let fail = |what: &'static str| move |e| Error::failed(what).because(e);
    let counters = SharedCounters::map(found.counters).map_err(fail("the counters cannot be mapped"))?;
    let listener = match found.listener {
        Some(listener) => listener,
        None => crate::control::open(&record)?,
    };
    let mut files = found.files;
    let backings = Backings::restore(snapshot.backings, |row: &BackingRow| {
        let at = files.iter().position(|fd| {
            rustix::fs::fstat(fd).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == row.identity)
        })?;
        Some(files.swap_remove(at))
    });
    let kept = Kept {
        options: snapshot.options,
        device: snapshot.device,
        init: snapshot.init,
        reply: snapshot.reply,
        chosen: snapshot.chosen,
        restarts: snapshot.restarts,
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

/// A descriptor that is readable once a signal asks for the end.
fn signals() -> Result<OwnedFd> {
    let begin = || -> std::io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)?;
        }
        Ok(ours.into())
    };
    begin().map_err(|e| Error::failed("cannot wait for signals").because(e))
}

fn log_to(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> {
        let file = std::fs::File::options().create(true).append(true).open(&path)?;
        Ok(rustix::stdio::dup2_stderr(&file)?)
    };
    open().map_err(|e| Error::io("cannot write the log", &path, e))
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

/// Each backing is a descriptor here and in the server.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now }) {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}
