//! The supervisor: mounts, keeps what must outlive a server, and starts the next server when one dies.

mod backings;
mod cache;
mod checks;
mod shared;
mod users;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use stencilfs::control::{Channel, Failure, LOG_FILE, MountOptions, RecordDir, UnmountMode};
use stencilfs::error::{Code, Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::sys::{fuse_dev, mount};

use crate::link::{Answer, Ask, Hello};
use crate::stats::{Counter, Stats};
pub use shared::Shared;

/// So many servers in a row may die before they answered anything; then each next one waits longer.
const FREE_DEATHS: u32 = 3;
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Runs a mount from its begin to its end.
pub fn main(options: MountOptions) -> ExitCode {
    let foreground = options.foreground;
    if !foreground {
        // A session of its own: the caller's terminal may go. It fails only for what is a leader already.
        let _ = rustix::process::setsid();
    }
    let mut caller = Caller { foreground, waiting: true };
    match run(options, &mut caller) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            caller.tell(Some(&error));
            ExitCode::from(error.code().exit_code())
        }
    }
}

/// Who started the supervisor, and reads one line about how it went from standard output.
struct Caller {
    foreground: bool,
    waiting: bool,
}

impl Caller {
    /// Says that the mount answers, or why there is none; once.
    fn tell(&mut self, error: Option<&Error>) {
        if !std::mem::take(&mut self.waiting) || self.foreground {
            match error {
                Some(error) if self.foreground => {
                    eprintln!("stencil-mountd: {error}");
                    if let Some(remedy) = error.remedy_text() {
                        eprintln!("stencil-mountd: {remedy}");
                    }
                }
                Some(error) => log::error!("{error}"),
                None => {}
            }
            return;
        }
        let line = serde_json::to_string(&error.map(Failure::from)).unwrap_or_default();
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}

fn run(mut options: MountOptions, caller: &mut Caller) -> Result<()> {
    options.mountpoint = checks::mountpoint(&options.mountpoint)?;
    let store = Store::open(&options.store)?;
    options.store = store.dir().to_owned();
    let fuse = fuse_dev::open()?;
    let record = RecordDir::create(std::process::id())?;
    if !options.foreground {
        log_to(&record)?;
    }
    let counters =
        SharedCounters::create().map_err(|e| Error::failed("cannot make the counters page").because(e))?;
    mount::mount_fuse(&fuse, "stencil", &options.mountpoint, options.noexec)?;
    let device = checks::device_at(&options.mountpoint)?;
    let mountpoint = options.mountpoint.clone();
    let mounted = Mounted { mountpoint: &mountpoint, device };
    let init = fuse_dev::read_init(&fuse)
        .map_err(|e| Error::failed("the kernel does not begin to speak").because(e))?;
    let cache = cache::choose(&options, &init)?;
    if !options.foreground {
        // Every path is canonical by now; the caller's directory must not be held.
        std::env::set_current_dir("/").map_err(|e| Error::io("cannot enter", "/", e))?;
    }
    let shared =
        Arc::new(Shared::new(options.clone(), fuse, device, init, record, Stats::new(counters), cache));
    shared.write_record()?;
    crate::control::answer_callers(crate::control::listen(&shared.record_dir())?, Arc::clone(&shared));
    end_on_signals(Arc::clone(&shared))?;
    let result = keep_serving(&shared, caller);
    drop(mounted);
    shared.wait_for_callers();
    shared.close();
    result
}

/// Takes the mount away when the supervisor ends while it is still there: nobody would answer it any more.
struct Mounted<'a> {
    mountpoint: &'a Path,
    device: u64,
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if checks::device_at(self.mountpoint).is_ok_and(|device| device == self.device)
            && let Err(error) = mount::unmount(self.mountpoint, true)
        {
            log::error!("cannot unmount {}: {error}", self.mountpoint.display());
        }
    }
}

fn log_to(record: &RecordDir) -> Result<()> {
    let path = record.path().join(LOG_FILE);
    let open = || -> std::io::Result<()> {
        let file = std::fs::File::options().create(true).append(true).open(&path)?;
        Ok(rustix::stdio::dup2_stderr(&file)?)
    };
    open().map_err(|e| Error::io("cannot write the log", &path, e))
}

/// SIGTERM and the like end the mount as soon as nobody is hurt: at once, or with its last mapping.
fn end_on_signals(shared: Arc<Shared>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|e| Error::failed("cannot wait for signals").because(e))?;
    thread::spawn(move || {
        for signal in signals.forever() {
            log::info!("signal {signal}: unmounting");
            match shared.unmount(UnmountMode::Plain) {
                Err(error) if error.code() == Code::InUse => {
                    log::warn!("{error}; it is detached, and served until its last user ends");
                    if let Err(error) = shared.unmount(UnmountMode::Lazy) {
                        log::error!("{error}");
                    }
                }
                Err(error) => log::error!("{error}"),
                Ok(()) => {}
            }
        }
    });
    Ok(())
}

/// Starts servers until the connection is over.
fn keep_serving(shared: &Arc<Shared>, caller: &mut Caller) -> Result<()> {
    let mut idle_deaths = 0;
    let mut successor = false;
    loop {
        let answers = shared.stats.get(Counter::Answers);
        let begun = Instant::now();
        let end = serve_once(shared, successor, caller);
        if fuse_dev::is_over(&shared.fuse) {
            log::info!("the mount is over");
            return Ok(());
        }
        match end {
            End::Died if caller.waiting && idle_deaths + 1 >= FREE_DEATHS => {
                return Err(Error::failed("the server dies before it answers")
                    .remedy("start it with -f and STENCIL_LOG=debug to see why"));
            }
            End::Died => {}
            End::GaveUp(failure) if caller.waiting => return Err(failure.into_error()),
            End::GaveUp(failure) => log::error!("no server: {}", failure.into_error()),
        }
        successor = shared.is_greeted();
        idle_deaths = if shared.stats.get(Counter::Answers) == answers { idle_deaths + 1 } else { 0 };
        shared.count_restart();
        log::warn!("the server has died after {:.1} s; starting another", begun.elapsed().as_secs_f64());
        if idle_deaths > FREE_DEATHS {
            pause(shared, idle_deaths - FREE_DEATHS);
        }
    }
}

/// Waits before the next start, twice as long each time; not longer than the connection lives.
fn pause(shared: &Shared, nth: u32) {
    let length = SHORTEST_PAUSE.saturating_mul(1 << nth.min(10)).min(LONGEST_PAUSE);
    log::error!("{nth} servers beyond {FREE_DEATHS} in a row died before they answered: waiting {length:?}");
    let until = Instant::now() + length;
    while Instant::now() < until && !fuse_dev::is_over(&shared.fuse) {
        thread::sleep(SHORTEST_PAUSE);
    }
}

enum End {
    Died,
    GaveUp(Failure),
}

/// Starts a server and answers it until its end of the link closes, which is when it dies.
fn serve_once(shared: &Arc<Shared>, successor: bool, caller: &mut Caller) -> End {
    let (mut child, link) = match start_server(shared) {
        Ok(started) => started,
        Err(error) => return End::GaveUp(Failure::from(&error)),
    };
    shared.set_server(Some(child.id()));
    let mut end = End::Died;
    let hello = shared.hello(successor);
    if let Err(error) = greet(&link, &hello, shared) {
        log::error!("cannot greet the server: {error}");
    }
    while let Ok(Some((ask, fd))) = link.receive::<Ask>() {
        let handshake = matches!(ask, Ask::Handshake { .. });
        if let Ask::GiveUp { failure } = &ask {
            end = End::GaveUp(failure.clone());
        }
        let answer = shared.answer(ask, fd).unwrap_or_else(|e| Answer::Refused(Failure::from(&e)));
        let accepted = handshake && matches!(answer, Answer::Done);
        if link.send(&answer, None).is_err() {
            break;
        }
        if accepted {
            shared.greeted.store(true, Ordering::SeqCst);
            caller.tell(None);
        }
    }
    shared.set_server(None);
    // A process that the kernel cannot end yet must not hold up its successor.
    thread::spawn(move || {
        if let Ok(status) = child.wait() {
            log::info!("server {} has ended: {status}", child.id());
        }
    });
    end
}

fn greet(link: &Channel, hello: &Hello, shared: &Shared) -> std::io::Result<()> {
    use std::os::fd::AsFd;
    link.send(hello, Some(shared.stats.page().fd().as_fd()))
}

/// The server inherits the connection as descriptor 0, the link as 1, the log as 2, and nothing else.
fn start_server(shared: &Shared) -> Result<(Child, Channel)> {
    let fail = |e: std::io::Error| {
        Error::failed("cannot start a server").because(e).remedy("see the limits of processes and open files")
    };
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    let fuse = shared.fuse.try_clone().map_err(fail)?;
    let child = Command::new("/proc/self/exe")
        .arg0("stencil-mountd")
        .arg("serve")
        .arg("--")
        .arg(&shared.options.mountpoint)
        .stdin(Stdio::from(fuse))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        // Out of reach of Ctrl-C at the supervisor's terminal.
        .process_group(0)
        .spawn()
        .map_err(fail)?;
    Ok((child, Channel::new(ours.into())))
}
