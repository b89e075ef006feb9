//! Clones that run a command of the user.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::active_launch::ActiveLaunch;
use super::order::Ready;
use crate::clones::launch::clone_resources;
use crate::clones::recipe::{Escape, Needs};
use crate::clones::registry::{Entry, LOG, process_tree};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::process::procfs;
use crate::sys::process::session::{Child, Session};

/// Maximum length of a Unix socket path in bytes (`sun_path` without its final zero byte).
const MAX_SOCKET_PATH: usize = 107;

/// Interval for looking for the control socket of a VMM. Firecracker opens it some 2 ms after its start.
const SOCKET_INTERVAL: Duration = Duration::from_millis(1);

/// Interval for searching the process tree of a command; each search reads every process of the host.
const PROCESS_TREE_INTERVAL: Duration = Duration::from_millis(200);

/// Starts the command and waits until the clone is ready.
///
/// # Errors
/// Returns an error if the command cannot be started or exits before it is ready, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn run(active: &ActiveLaunch<'_>, argv: &[String], ready: Ready, entry: &mut Entry) -> Result<Child> {
    let target = active.order.target;
    let needs = Needs::of(argv);
    let disks = if needs.disks.is_empty() { vec![] } else { target.recipe()?.disks };
    let (values, reserved) =
        clone_resources::allocate(target, &disks, &needs, entry, 0, || active.is_over())?;
    let filled = argv.iter().map(|arg| values.fill(arg, Escape::None)).collect::<Result<Vec<_>>>()?;
    let Some((program, args)) = filled.split_first() else {
        return Err(Error::usage("missing command").hint("write the command after --: -- CMD {memory}"));
    };
    let mut command = Session::new(program);
    command
        .args(args)
        .envs(values.variables())
        .env("STENCIL_TEMPLATE", active.order.target.digest.to_string());
    let notified = match ready {
        Ready::Mapped => None,
        Ready::Notify => {
            let (notified, notify) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|e| Error::failed("cannot create a pipe").because(e.into()))?;
            command.env("STENCIL_NOTIFY", notify.as_raw_fd().to_string());
            command.inherit(notify);
            Some(notified)
        }
    };
    // A program that does not set SO_REUSEADDR cannot listen on a port that another socket has bound.
    drop(reserved);
    let mut child = spawn(&mut command, entry)?;
    // Closes the launcher's copy of the write end, so that the read end reports EOF when the command exits.
    drop(command);
    let wait = ReadyWait::new(active);
    let outcome = match notified {
        Some(notified) => wait_notified(&wait, &notified, &mut child, entry),
        None => wait_mapped(&wait, &mut child, entry),
    };
    match outcome {
        Ok(()) => Ok(child),
        Err(error) => Err(kill(child, entry, error)),
    }
}

/// Kills the whole process tree of a clone that did not become ready, and returns the error of the launch.
pub fn kill(mut child: Child, entry: &Entry, error: Error) -> Error {
    match process_tree::kill(std::slice::from_ref(entry)) {
        Ok(()) => {
            let _ = child.wait();
            error
        }
        // A wait for a process that cannot be killed would not return.
        Err(other) => {
            let _ = child.kill();
            let _ = child.try_wait();
            error.and(other)
        }
    }
}

/// Starts the process of a clone: redirects its output to the clone's log and stores its process id in the record.
///
/// # Errors
/// Returns an error if the program cannot be started or the record cannot be written.
pub fn spawn(command: &mut Session, entry: &mut Entry) -> Result<Child> {
    let null = File::open("/dev/null").map_err(|e| Error::io("cannot open", "/dev/null", e))?;
    let output = entry.open_log(LOG)?;
    spawn_with(command, entry, null.as_fd(), output.as_fd())
}

/// Same as [`spawn`] with another standard input and output.
///
/// # Errors
/// Same as [`spawn`].
pub fn spawn_with(
    command: &mut Session,
    entry: &mut Entry,
    input: BorrowedFd<'_>,
    output: BorrowedFd<'_>,
) -> Result<Child> {
    let errors = entry.open_log(LOG)?;
    command.env("STENCIL_DIR", &entry.dir);
    let mut child = command.spawn([input, output, errors.as_fd()]).map_err(|e| {
        Error::io("cannot start the command", command.program(), e)
            .hint("check that the program is installed and executable; a script needs a first line such as #!/bin/sh")
    })?;
    let noted = ProcessId::of(child.id()).and_then(|id| id.map_or(Ok(()), |id| entry.set_process(id)));
    if let Err(error) = noted {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}

/// A wait for a clone to become ready, with a timeout.
pub struct ReadyWait<'a> {
    active: &'a ActiveLaunch<'a>,
    /// End of the wait.
    pub deadline: Instant,
}

impl<'a> ReadyWait<'a> {
    /// Starts the timeout now.
    pub fn new(active: &'a ActiveLaunch<'a>) -> ReadyWait<'a> {
        ReadyWait { active, deadline: Instant::now() + active.order.ready_timeout }
    }

    /// Sleeps for `interval`.
    ///
    /// # Errors
    /// Returns an error if the launch was cancelled, and [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
    pub fn pause(&self, interval: Duration) -> Result<()> {
        if self.active.is_over() {
            return Err(Error::failed("the launch was cancelled"));
        }
        if Instant::now() >= self.deadline {
            return Err(Error::try_again(format!(
                "timed out after {} s waiting for the clone",
                self.active.order.ready_timeout.as_secs_f64()
            ))
            .hint("see the log of the clone, or wait longer with --timeout"));
        }
        std::thread::sleep(interval);
        Ok(())
    }
}

/// Checks that a socket with this path can be connected to.
///
/// # Errors
/// Returns an error if the path is too long for a socket.
pub fn expect_short(socket: &str) -> Result<()> {
    if socket.len() <= MAX_SOCKET_PATH {
        return Ok(());
    }
    Err(Error::failed(format!(
        "the path of a clone's socket is too long: {} bytes, the limit is {MAX_SOCKET_PATH}",
        socket.len()
    ))
    .at(socket)
    .hint("set STENCIL_RUNTIME_DIR, or --chroot-base-dir for jails, to a shorter path"))
}

/// The socket on which a VMM takes commands.
pub struct ControlSocket<'a> {
    /// Name of the VMM, for errors.
    pub vmm: &'a str,
    /// Name of the socket, for errors.
    pub name: &'a str,
    /// Path of the socket.
    pub path: PathBuf,
    /// The remedy if the VMM exits early.
    pub hint: &'a str,
}

/// Waits until a VMM listens on its socket, and connects.
///
/// # Errors
/// Returns an error if the VMM exits before it listens on the socket, if the connection fails for another reason than
/// that nothing listens yet, or if the launch is cancelled, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn connect<T>(
    wait: &ReadyWait<'_>,
    child: &mut Child,
    entry: &Entry,
    socket: &ControlSocket<'_>,
    open: impl Fn(&Path) -> Result<T>,
) -> Result<T> {
    let ControlSocket { vmm, name, path, hint } = socket;
    let mut next_search = Instant::now();
    loop {
        if path.exists() {
            match open(path) {
                // Bound, not listening yet.
                Err(e) if e.errno() == Some(connection_refused()) => {}
                other => return other,
            }
        }
        let exited =
            child.try_wait().map_err(|e| Error::failed(format!("cannot wait for {vmm}")).because(e))?;
        // A script may have started the VMM as a child and exited.
        if let Some(status) = exited
            && Instant::now() >= next_search
        {
            next_search = Instant::now() + PROCESS_TREE_INTERVAL;
            if process_tree::of_folder(&entry.dir).is_empty() {
                let what = format!("{vmm} exited before it opened its {name} socket ({status})");
                return Err(Error::failed(what).hint(*hint));
            }
        }
        wait.pause(SOCKET_INTERVAL)?;
    }
}

fn connection_refused() -> i32 {
    rustix::io::Errno::CONNREFUSED.raw_os_error()
}

fn wait_mapped(wait: &ReadyWait<'_>, child: &mut Child, entry: &mut Entry) -> Result<()> {
    let target = wait.active.order.target;
    let maps = |pid: u32| -> Result<bool> {
        Ok(procfs::maps(pid, |dev, ino| target.is_mapped_by(dev, ino))?.is_some_and(|m| !m.is_empty()))
    };
    let mut interval = Duration::from_millis(1);
    let mut next_search = Instant::now() + PROCESS_TREE_INTERVAL;
    loop {
        if maps(child.id())? {
            return Ok(());
        }
        let exited = child.try_wait().map_err(|e| Error::failed("cannot wait for the command").because(e))?;
        // A descendant of the command may map the template, possibly after the command itself has exited.
        if exited.is_some() || Instant::now() >= next_search {
            next_search = Instant::now() + PROCESS_TREE_INTERVAL;
            let processes = process_tree::of_folder(&entry.dir);
            for process in &processes {
                if maps(process.pid)? {
                    return entry.set_process(*process);
                }
            }
            if let (Some(status), true) = (exited, processes.is_empty()) {
                return Err(Error::failed(format!(
                    "the command exited before it mapped the template ({status})"
                ))
                .hint("see the log of the clone; the command must map {memory} while it runs"));
            }
        }
        wait.pause(interval)?;
        interval = (interval * 2).min(Duration::from_millis(20));
    }
}

fn wait_notified(
    wait: &ReadyWait<'_>,
    notified: &OwnedFd,
    child: &mut Child,
    entry: &mut Entry,
) -> Result<()> {
    let interval = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    loop {
        // The exit is checked before the poll: a command may exit right after its notification.
        let exited =
            child.try_wait().ok().flatten().filter(|_| process_tree::of_folder(&entry.dir).is_empty());
        let ready = poll(&mut [PollFd::new(notified, PollFlags::IN)], Some(&interval)).is_ok_and(|n| n > 0);
        if ready {
            let mut byte = [0];
            return match rustix::io::read(notified, &mut byte) {
                Ok(1) => Ok(()),
                Ok(_) => {
                    let status =
                        child.wait().map_err(|e| Error::failed("cannot wait for the command").because(e))?;
                    Err(Error::failed(format!(
                        "the command closed the descriptor STENCIL_NOTIFY without a notification ({status})"
                    )))
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => Err(Error::failed("cannot read the notification of the command").because(e.into())),
            };
        }
        if let Some(status) = exited {
            return Err(Error::failed(format!("the command exited before it was ready ({status})")));
        }
        wait.pause(Duration::ZERO)?;
    }
}
