//! A clone that is any command of the user's.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Herd, own};
use crate::clones::family;
use crate::clones::recipe::{Escape, Needs};
use crate::clones::registry::Entry;
use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, inherit, own_session};
use crate::sys::procfs;

/// How often it is looked whether a command has started others: that is a look at every process of the host.
const FAMILY_INTERVAL: Duration = Duration::from_millis(200);

/// When a command counts as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// As soon as it maps the template's memory.
    Mapped,
    /// When it writes to the descriptor whose number is in `STENCIL_NOTIFY`.
    Notify,
}

/// Starts the command and waits until it is ready.
///
/// # Errors
/// When it cannot be started, ends before, or takes too long.
pub fn run(herd: &Herd<'_>, argv: &[String], ready: Ready, entry: &mut Entry) -> Result<Child> {
    let target = herd.order.target;
    let needs = Needs::of(argv);
    let disks = if needs.disks.is_empty() { vec![] } else { target.recipe()?.disks };
    let (values, reserved) = own::make(target, &disks, &needs, entry, 0, || herd.is_over())?;
    let filled = argv.iter().map(|arg| values.fill(arg, Escape::None)).collect::<Result<Vec<_>>>()?;
    let Some((program, args)) = filled.split_first() else {
        return Err(Error::usage("no command is given").remedy("write it after --, like -- CMD {memory}"));
    };
    let mut command = Command::new(program);
    own_session(&mut command)
        .args(args)
        .envs(values.variables())
        .env("STENCIL_TEMPLATE", herd.order.target.digest.to_string());
    let heard = match ready {
        Ready::Mapped => None,
        Ready::Notify => {
            let (heard, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|e| Error::failed("cannot make a pipe").because(e.into()))?;
            command.env("STENCIL_NOTIFY", say.as_raw_fd().to_string());
            inherit(&mut command, say);
            Some(heard)
        }
    };
    // Not every program can listen where another one holds the port.
    drop(reserved);
    let mut child = spawn(&mut command, entry)?;
    // The launcher's own copy of the writing end goes with the command.
    drop(command);
    let patience = Patience::new(herd);
    let outcome = match heard {
        Some(heard) => wait_notified(&patience, &heard, &mut child, entry),
        None => wait_mapped(&patience, &mut child, entry),
    };
    match outcome {
        Ok(()) => Ok(child),
        Err(error) => {
            family::kill(std::slice::from_ref(entry))?;
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Starts a program as a clone: its output goes to the clone's log, its process into the record.
///
/// # Errors
/// When it cannot be started.
pub fn spawn(command: &mut Command, entry: &mut Entry) -> Result<Child> {
    let (out, err) = (entry.open_log()?, entry.open_log()?);
    command
        .env("STENCIL_DIR", &entry.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::from(out))
        .stderr(Stdio::from(err));
    let program = command.get_program().to_owned();
    let mut child = command.spawn().map_err(|e| {
        Error::io("cannot start the command", &program, e)
            .remedy("see that it is installed and may be executed")
    })?;
    let noted = ProcessId::of(child.id()).and_then(|id| id.map_or(Ok(()), |id| entry.set_process(id)));
    if let Err(error) = noted {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}

/// How long a clone is waited for.
pub struct Patience<'a> {
    herd: &'a Herd<'a>,
    /// When it has had its time.
    pub deadline: Instant,
}

impl<'a> Patience<'a> {
    /// Begins now.
    pub fn new(herd: &'a Herd<'a>) -> Patience<'a> {
        Patience { herd, deadline: Instant::now() + herd.order.patience }
    }

    /// Sleeps a moment.
    ///
    /// # Errors
    /// When the launch is over or the time is up.
    pub fn pause(&self, moment: Duration) -> Result<()> {
        if self.herd.is_over() {
            return Err(Error::failed("the launch was given up"));
        }
        if Instant::now() >= self.deadline {
            return Err(Error::try_again(format!(
                "it was not ready after {} s",
                self.herd.order.patience.as_secs_f64()
            ))
            .remedy("see its log, or wait longer with --timeout"));
        }
        std::thread::sleep(moment);
        Ok(())
    }
}

fn wait_mapped(patience: &Patience<'_>, child: &mut Child, entry: &mut Entry) -> Result<()> {
    let target = patience.herd.order.target;
    let maps = |pid: u32| -> Result<bool> {
        Ok(procfs::maps(pid, |dev, ino| target.is_mapped_by(dev, ino))?.is_some_and(|m| !m.is_empty()))
    };
    let mut moment = Duration::from_millis(1);
    let mut next_look = Instant::now() + FAMILY_INTERVAL;
    loop {
        if maps(child.id())? {
            return Ok(());
        }
        let ended = child.try_wait().map_err(|e| Error::failed("cannot wait for the command").because(e))?;
        // It may have started another process that maps the template, and may itself be gone.
        if ended.is_some() || Instant::now() >= next_look {
            next_look = Instant::now() + FAMILY_INTERVAL;
            let family = family::of_folder(&entry.dir);
            for process in &family {
                if maps(process.pid)? {
                    return entry.set_process(*process);
                }
            }
            if let (Some(status), true) = (ended, family.is_empty()) {
                return Err(Error::failed(format!("it ended before it mapped the template ({status})"))
                    .remedy("its log says why; the command must map {memory} while it runs"));
            }
        }
        patience.pause(moment)?;
        moment = (moment * 2).min(Duration::from_millis(20));
    }
}

fn wait_notified(
    patience: &Patience<'_>,
    heard: &OwnedFd,
    child: &mut Child,
    entry: &mut Entry,
) -> Result<()> {
    let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    loop {
        // Asked first: a command may end as soon as it has said that it is ready.
        let ended = child.try_wait().ok().flatten().filter(|_| family::of_folder(&entry.dir).is_empty());
        let ready = poll(&mut [PollFd::new(heard, PollFlags::IN)], Some(&moment)).is_ok_and(|n| n > 0);
        if ready {
            let mut byte = [0];
            return match rustix::io::read(heard, &mut byte) {
                Ok(1) => Ok(()),
                Ok(_) => {
                    let status =
                        child.wait().map_err(|e| Error::failed("cannot wait for the command").because(e))?;
                    Err(Error::failed(format!(
                        "it closed the descriptor of STENCIL_NOTIFY without a word ({status})"
                    )))
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => Err(Error::failed("cannot hear the command").because(e.into())),
            };
        }
        if let Some(status) = ended {
            return Err(Error::failed(format!("it ended before it was ready ({status})")));
        }
        patience.pause(Duration::ZERO)?;
    }
}
