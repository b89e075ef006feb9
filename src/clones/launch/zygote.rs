//! The zygote, the parent process of simulated clones: a small process with a single thread, so that forking is safe
//! and cheap.
//!
//! The zygote reads from standard input: one line of JSON (the job), then `start INDEX` for each clone, `cancel INDEX`
//! for a clone past its timeout, and finally `release`. The zygote writes to standard output: `started INDEX PID
//! IDENTITY`, `ready INDEX`, `failed INDEX REASON` and `released`. End of input before `release` means that the
//! launcher died: the zygote exits, and its workers die with it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::Signal;

use super::job::{Job, Order};
use super::worker::{self, Pipes};
use crate::clones::counted;
use crate::error::{Error, Result};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::poll::poll_for;
use crate::sys::process::{self, Fork, ProcessId};

/// The argument that makes this program a zygote.
pub const ARGUMENT: &str = "launch-zygote";

/// Runs the zygote.
pub fn main() -> ExitCode {
    match Zygote::start().and_then(Zygote::serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::print_line!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A worker that still depends on the zygote.
#[derive(Debug)]
struct Worker {
    pid: u32,
    /// The reason that the worker reported for its failure.
    failure: Option<String>,
    ready: bool,
}

/// The next step after a request of the launcher.
enum Next {
    /// Waits for the next event.
    Continue,
    /// Exits.
    Exit,
    /// Runs a worker: this process is the forked child.
    Work { index: u32, zygote: u32 },
}

struct Zygote {
    job: Job,
    input: BufReader<io::StdinLock<'static>>,
    messages: OwnedFd,
    unread: String,
    pipes: Pipes,
    release: OwnedFd,
    fault: OwnedFd,
    /// Readable when a worker has exited.
    exits: OwnedFd,
    /// The workers by index.
    workers: BTreeMap<u32, Worker>,
    /// The indexes of the workers by process id.
    indexes: HashMap<u32, u32>,
    /// Process ids of killed workers that have not exited yet.
    killed: HashSet<u32>,
    /// Number of ready workers that have not exited.
    ready: usize,
    /// Number of workers that no longer depend on the zygote.
    free: usize,
}

/// The descriptors that a wait has found readable.
struct Events {
    launcher: bool,
    workers: bool,
    exits: bool,
}

impl Zygote {
    fn start() -> Result<Zygote> {
        let mut input = BufReader::with_capacity(4096, io::stdin().lock());
        let mut line = String::new();
        input.read_line(&mut line).map_err(|e| Error::io("cannot read the job", "standard input", e))?;
        let order: Order =
            serde_json::from_str(&line).map_err(|e| Error::usage(format!("cannot parse the job: {e}")))?;
        let pipe = || {
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|e| Error::failed("cannot create a pipe").because(e.into()))
        };
        let ((messages, send), (wait_release, release), (wait_fault, fault)) = (pipe()?, pipe()?, pipe()?);
        Ok(Zygote {
            job: Job::new(order)?,
            input,
            messages,
            unread: String::new(),
            pipes: Pipes { messages: send, release: wait_release, fault: wait_fault },
            release,
            fault,
            exits: process::child_exits()?,
            workers: BTreeMap::new(),
            indexes: HashMap::new(),
            killed: HashSet::new(),
            ready: 0,
            free: 0,
        })
    }

    fn serve(mut self) -> Result<()> {
        loop {
            let events = self.wait()?;
            self.handle_workers(&events)?;
            if events.launcher {
                match self.handle_request()? {
                    Next::Continue => {}
                    Next::Exit => return Ok(()),
                    Next::Work { index, zygote } => self.work(index, zygote),
                }
            }
        }
    }

    /// Runs a worker in its forked process, after closing the zygote's ends of the pipes.
    fn work(self, index: u32, zygote: u32) -> ! {
        let Zygote { job, pipes, messages, release, fault, exits, workers, indexes, killed, .. } = self;
        drop((messages, release, fault, exits));
        // Dropping the maps would write to their pages, which would copy them.
        std::mem::forget((workers, indexes, killed));
        worker::run(&job, index, zygote, pipes)
    }

    /// Waits for the launcher or the workers.
    fn wait(&self) -> Result<Events> {
        let stdin = io::stdin();
        let buffered = !self.input.buffer().is_empty();
        let on = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [on(stdin.as_fd()), on(self.messages.as_fd()), on(self.exits.as_fd())];
        match poll_for(&mut fds, buffered.then_some(Duration::ZERO)) {
            Ok(_) | Err(Errno::INTR) => {
                let [launcher, workers, exits] = fds.map(|fd| !fd.revents().is_empty());
                Ok(Events { launcher: launcher || buffered, workers, exits })
            }
            Err(e) => {
                Err(Error::failed("cannot wait for the launcher and the simulated clones").because(e.into()))
            }
        }
    }

    fn handle_workers(&mut self, events: &Events) -> Result<()> {
        if events.workers {
            self.read_messages()?;
        }
        if events.exits {
            process::clear_child_exits(&self.exits);
            self.reap()?;
        }
        Ok(())
    }

    /// Handles one request of the launcher.
    fn handle_request(&mut self) -> Result<Next> {
        let mut line = String::new();
        let got = self.input.read_line(&mut line);
        if got.map_err(|e| Error::io("cannot read from the launcher", "standard input", e))? == 0 {
            return Ok(Next::Exit);
        }
        match line.trim_end().split_once(' ') {
            Some(("start", index)) => {
                let index =
                    index.parse().map_err(|_| Error::usage(format!("invalid clone index '{index}'")))?;
                self.fork(index)
            }
            Some(("cancel", index)) => {
                let worker = index.parse().ok().and_then(|index: u32| self.workers.remove(&index));
                if let Some(worker) = worker {
                    self.ready -= usize::from(worker.ready);
                    self.kill(worker.pid)?;
                }
                Ok(Next::Continue)
            }
            None if line == "release\n" => {
                self.release_workers()?;
                tell("released")?;
                Ok(Next::Exit)
            }
            _ => Err(Error::usage(format!("unknown request of the launcher: '{}'", line.trim_end()))),
        }
    }

    fn fork(&mut self, index: u32) -> Result<Next> {
        let zygote = std::process::id();
        match process::fork_single_threaded() {
            Ok(Fork::Child) => return Ok(Next::Work { index, zygote }),
            Ok(Fork::Parent(pid)) => {
                // The launcher writes the identity of the process into the record.
                match ProcessId::of(pid) {
                    Ok(Some(process)) => {
                        self.workers.insert(index, Worker { pid, failure: None, ready: false });
                        self.indexes.insert(pid, index);
                        tell(&format!("started {index} {pid} {}", process.identity))?;
                    }
                    Ok(None) => {
                        self.kill(pid)?;
                        tell(&format!("failed {index} the process has exited"))?;
                    }
                    Err(error) => {
                        self.kill(pid)?;
                        tell(&format!("failed {index} {error}"))?;
                    }
                }
            }
            Err(error) => tell(&format!("failed {index} {error}"))?,
        }
        Ok(Next::Continue)
    }

    /// Kills a worker. The other workers are released after its exit, because the worker could read the byte that
    /// releases another worker.
    fn kill(&mut self, pid: u32) -> Result<()> {
        self.killed.insert(pid);
        process::signal_child(pid, Signal::KILL)
    }

    /// Reads and handles messages of the workers.
    fn read_messages(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let got = match rustix::io::read(&self.messages, &mut buffer) {
            Ok(got) => got,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(Error::failed("cannot read from the simulated clones").because(e.into())),
        };
        self.unread.push_str(&String::from_utf8_lossy(buffer.get(..got).unwrap_or_default()));
        while let Some(end) = self.unread.find('\n') {
            let line: String = self.unread.drain(..=end).collect();
            self.handle_message(line.trim_end())?;
        }
        Ok(())
    }

    fn handle_message(&mut self, line: &str) -> Result<()> {
        let mut words = line.splitn(3, ' ');
        let (verb, index, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
        let Some(index) = index.and_then(|i| i.parse::<u32>().ok()) else { return Ok(()) };
        let Some(worker) = self.workers.get_mut(&index) else { return Ok(()) };
        let pid = worker.pid;
        match verb {
            Some("ready") => {
                worker.ready = true;
                self.ready += 1;
                tell(line)
            }
            Some("free") => {
                self.free += 1;
                Ok(())
            }
            Some("failed") => {
                worker.failure = Some(rest.to_owned());
                Ok(())
            }
            Some("fault") => {
                let mut rest = rest.splitn(3, ' ');
                let (start, end) = (rest.next(), rest.next());
                let range = start.and_then(|s| s.parse().ok()).zip(end.and_then(|e| e.parse().ok()));
                let Some((start, end)) = range else { return Ok(()) };
                let private = Pagemap::open(pid).and_then(|pages| pages.dirty(start..end));
                let private = match private {
                    Ok(regions) => {
                        counted(regions.iter().map(|r| r.pages()).sum(), "private page", "private pages")
                    }
                    // The worker was killed meanwhile.
                    Err(_) => "an unknown number of private pages".to_owned(),
                };
                worker.failure = Some(format!(
                    "the clone wrote to the ROM file '{}'; before the write the clone had {private} of the file",
                    rest.next().unwrap_or_default()
                ));
                process::signal_child(pid, Signal::SEGV)
            }
            _ => Ok(()),
        }
    }

    /// Reports workers that have exited. Before `release` every worker depends on the zygote, so each exit is a
    /// failure.
    fn reap(&mut self) -> Result<()> {
        while let Some((pid, ended)) = process::reap_one()? {
            // The worker's last message may still be in the pipe.
            self.drain()?;
            self.killed.remove(&pid);
            let Some(index) = self.indexes.remove(&pid) else { continue };
            let Some(worker) = self.workers.remove(&index) else { continue };
            self.ready -= usize::from(worker.ready);
            let why = match (worker.failure, ended) {
                (Some(failure), process::Ended::Signal(_)) => format!("{ended}: {failure}"),
                (Some(failure), process::Ended::Code(_)) => failure,
                (None, _) => ended.to_string(),
            };
            tell(&format!("failed {index} {why}"))?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        while poll_for(&mut [PollFd::new(&self.messages, PollFlags::IN)], Some(Duration::ZERO)) == Ok(1) {
            self.read_messages()?;
        }
        Ok(())
    }

    /// Releases all ready workers, and waits until each has reported that it no longer depends on this process.
    fn release_workers(&mut self) -> Result<()> {
        let ready = self.ready;
        let mut sent = 0;
        while self.free < ready || !self.killed.is_empty() {
            // Fewer bytes than the pipe's capacity: a write to a full pipe would block this thread.
            while self.killed.is_empty() && sent < ready && sent - self.free < 1000 {
                rustix::io::write(&self.release, b"G")
                    .map_err(|e| Error::failed("cannot release a worker").because(e.into()))?;
                sent += 1;
            }
            let events = self.wait()?;
            self.handle_workers(&events)?;
            if events.launcher {
                return Err(Error::failed("the launcher ended"));
            }
            if self.ready < ready {
                return Err(Error::failed("a simulated clone exited before the launch was complete"));
            }
        }
        Ok(())
    }
}

fn tell(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|e| Error::io("cannot write to the launcher", "standard output", e))
}
