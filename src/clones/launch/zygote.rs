//! The parent of simulated clones: a process of its own, small and with one thread, so that it may fork.
//!
//! It reads from its standard input: one line of JSON (the job), then `start INDEX DIR` for each clone and
//! `release` at the end. It says on its standard output: `started INDEX PID START`, `ready INDEX`,
//! `failed INDEX WHY` and `released`. The end of its input before `release` means that the launcher has
//! gone: it exits, and its workers die with it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::simulate::Simulate;
use super::worker::{self, Pipes};
use crate::clones::registry::Touched;
use crate::error::{Error, Result};
use crate::memory::{Options, Plan};
use crate::sys::pagemap::Pagemap;
use crate::sys::process::{self, Fork, ProcessId};

/// The argument that makes this program a zygote.
pub const ARGUMENT: &str = "launch-zygote";

/// The job as the launcher gives it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The words of `--simulate`.
    pub simulate: String,
    /// Files to map.
    pub files: Vec<OrderFile>,
    /// The one whose pages are touched.
    pub touch: String,
    /// How many of its pages.
    pub touched: Touched,
}

/// One file to map.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OrderFile {
    /// Its name in the template.
    pub name: String,
    /// Where it is, below the mount.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Mapped read-only.
    pub rom: bool,
}

/// The job, ready to be carried out by workers.
#[derive(Debug)]
pub struct Job {
    /// What is touched.
    pub simulate: Simulate,
    /// Files to map.
    pub files: Vec<Mapped>,
    /// The one whose pages are touched.
    pub touch: String,
    /// How many of its pages.
    pub touched: Touched,
}

/// One file to map, and how.
#[derive(Debug)]
pub struct Mapped {
    /// Its name in the template.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Mapped read-only.
    pub rom: bool,
    /// The plan of its backend.
    pub plan: Plan,
}

impl Job {
    fn new(order: Order) -> Result<Job> {
        let files = order.files.into_iter().map(|file| {
            let path = file.path.display().to_string().replace(',', ",,");
            let rom = if file.rom { "on" } else { "off" };
            let text = format!(
                "memory-backend-file,id=ram,size={},mem-path={path},share=off,readonly=on,rom={rom}",
                file.size
            );
            Ok(Mapped {
                name: file.name,
                path: file.path,
                rom: file.rom,
                plan: Options::parse(&text)?.plan()?,
            })
        });
        Ok(Job {
            simulate: order.simulate.parse()?,
            files: files.collect::<Result<_>>()?,
            touch: order.touch,
            touched: order.touched,
        })
    }
}

/// The zygote's whole life.
pub fn main() -> ExitCode {
    match Zygote::start().and_then(Zygote::serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("stencil: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A worker that is not free yet.
#[derive(Debug)]
struct Worker {
    index: u32,
    /// What it said of its end.
    last_words: Option<String>,
    ready: bool,
}

/// What comes after a line of the launcher's.
enum Next {
    Go,
    End,
    /// This process is a worker now.
    Work {
        index: u32,
        dir: PathBuf,
        zygote: u32,
    },
}

struct Zygote {
    job: Job,
    input: BufReader<io::StdinLock<'static>>,
    heard: OwnedFd,
    unread: String,
    pipes: Pipes,
    release: OwnedFd,
    fault: OwnedFd,
    workers: BTreeMap<u32, Worker>,
    free: usize,
}

impl Zygote {
    fn start() -> Result<Zygote> {
        let mut input = BufReader::with_capacity(4096, io::stdin().lock());
        let mut line = String::new();
        input.read_line(&mut line).map_err(|e| Error::io("cannot read the job", "standard input", e))?;
        let order: Order = serde_json::from_str(&line)
            .map_err(|e| Error::usage(format!("the job cannot be understood: {e}")))?;
        let pipe = || {
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|e| Error::failed("cannot make a pipe").because(e.into()))
        };
        let ((heard, say), (wait_release, release), (wait_fault, fault)) = (pipe()?, pipe()?, pipe()?);
        Ok(Zygote {
            job: Job::new(order)?,
            input,
            heard,
            unread: String::new(),
            pipes: Pipes { say, release: wait_release, fault: wait_fault },
            release,
            fault,
            workers: BTreeMap::new(),
            free: 0,
        })
    }

    fn serve(mut self) -> Result<()> {
        loop {
            let (from_launcher, from_workers) = self.wait()?;
            if from_workers {
                self.listen()?;
            }
            self.reap()?;
            if from_launcher {
                match self.obey()? {
                    Next::Go => {}
                    Next::End => return Ok(()),
                    Next::Work { index, dir, zygote } => self.work(index, &dir, zygote),
                }
            }
        }
    }

    /// The life of a worker, in the process that was forked for it. It keeps none of the zygote's own ends.
    fn work(self, index: u32, dir: &Path, zygote: u32) -> ! {
        let Zygote { job, pipes, heard, release, fault, workers, .. } = self;
        drop((heard, release, fault));
        // Dropping the map would only copy its pages.
        std::mem::forget(workers);
        worker::run(&job, index, dir, zygote, pipes)
    }

    /// Waits for words of the launcher or of workers, or a moment, for the ends of workers.
    fn wait(&self) -> Result<(bool, bool)> {
        if !self.input.buffer().is_empty() {
            return Ok((true, false));
        }
        let stdin = io::stdin();
        let mut fds = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(&self.heard, PollFlags::IN)];
        let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        match poll(&mut fds, (!self.workers.is_empty()).then_some(&moment)) {
            Ok(_) | Err(Errno::INTR) => {
                let [launcher, workers] = &fds;
                Ok((!launcher.revents().is_empty(), !workers.revents().is_empty()))
            }
            Err(e) => Err(Error::failed("cannot wait").because(e.into())),
        }
    }

    /// Carries out one line of the launcher's.
    fn obey(&mut self) -> Result<Next> {
        let mut line = String::new();
        let got = self.input.read_line(&mut line);
        if got.map_err(|e| Error::io("cannot hear the launcher", "standard input", e))? == 0 {
            return Ok(Next::End);
        }
        let mut words = line.trim_end_matches('\n').splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("start"), Some(index), Some(dir)) => {
                let index = index.parse().map_err(|_| Error::usage(format!("'{index}' is no number")))?;
                self.fork(index, PathBuf::from(dir))
            }
            (Some("release"), ..) => {
                self.let_go()?;
                tell("released")?;
                Ok(Next::End)
            }
            _ => Err(Error::usage(format!("the launcher says '{}'", line.trim_end()))),
        }
    }

    fn fork(&mut self, index: u32, dir: PathBuf) -> Result<Next> {
        let zygote = std::process::id();
        match process::fork_single_threaded() {
            Ok(Fork::Child) => return Ok(Next::Work { index, dir, zygote }),
            Ok(Fork::Parent(pid)) => {
                self.workers.insert(pid, Worker { index, last_words: None, ready: false });
                let identity = ProcessId::of(pid)?.map_or(0, |id| id.identity);
                tell(&format!("started {index} {pid} {identity}"))?;
            }
            Err(error) => tell(&format!("failed {index} {error}"))?,
        }
        Ok(Next::Go)
    }

    /// Takes in what workers have said.
    fn listen(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let got = match rustix::io::read(&self.heard, &mut buffer) {
            Ok(got) => got,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(Error::failed("cannot hear the workers").because(e.into())),
        };
        self.unread.push_str(&String::from_utf8_lossy(buffer.get(..got).unwrap_or_default()));
        while let Some(end) = self.unread.find('\n') {
            let line: String = self.unread.drain(..=end).collect();
            self.heard_line(line.trim_end())?;
        }
        Ok(())
    }

    fn heard_line(&mut self, line: &str) -> Result<()> {
        let mut words = line.splitn(3, ' ');
        let (verb, index, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
        let Some(index) = index.and_then(|i| i.parse::<u32>().ok()) else { return Ok(()) };
        let Some((&pid, worker)) = self.workers.iter_mut().find(|(_, w)| w.index == index) else {
            return Ok(());
        };
        match verb {
            Some("ready") => {
                worker.ready = true;
                tell(line)
            }
            Some("free") => {
                self.free += 1;
                Ok(())
            }
            Some("failed") => {
                worker.last_words = Some(rest.to_owned());
                Ok(())
            }
            Some("fault") => {
                let mut rest = rest.splitn(3, ' ');
                let (start, end) = (rest.next(), rest.next());
                let range = start.and_then(|s| s.parse().ok()).zip(end.and_then(|e| e.parse().ok()));
                let Some((start, end)) = range else { return Ok(()) };
                let private = Pagemap::open(pid).and_then(|pages| pages.dirty(start..end));
                let private = match private {
                    Ok(regions) => regions.iter().map(|r| r.pages()).sum::<u64>().to_string(),
                    // Somebody else ended it meanwhile.
                    Err(_) => "an unknown number of".to_owned(),
                };
                worker.last_words = Some(format!(
                    "it wrote to the ROM file '{}' and had {private} private pages of it",
                    rest.next().unwrap_or_default()
                ));
                process::signal_child(pid, Signal::SEGV)
            }
            _ => Ok(()),
        }
    }

    /// Reports workers that have ended. None is free before `release`, so each end is a failure.
    fn reap(&mut self) -> Result<()> {
        while let Some((pid, ended)) = process::reap_one()? {
            // Its last words may still be in the pipe.
            self.drain()?;
            let Some(worker) = self.workers.remove(&pid) else { continue };
            let why = match (worker.last_words, ended) {
                (Some(words), process::Ended::Signal(_)) => format!("{ended}: {words}"),
                (Some(words), process::Ended::Code(_)) => words,
                (None, _) => ended.to_string(),
            };
            tell(&format!("failed {} {why}", worker.index))?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        while poll(&mut [PollFd::new(&self.heard.as_fd(), PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0) {
            self.listen()?;
        }
        Ok(())
    }

    /// Lets every ready worker go, and waits until each has said that it no longer depends on this process.
    fn let_go(&mut self) -> Result<()> {
        let ready = self.workers.values().filter(|w| w.ready).count();
        let mut sent = 0;
        while self.free < ready {
            // Never more bytes than a pipe holds: a full pipe would block this thread.
            while sent < ready && sent - self.free < 1000 {
                rustix::io::write(&self.release, b"G")
                    .map_err(|e| Error::failed("cannot let a worker go").because(e.into()))?;
                sent += 1;
            }
            self.drain_or_wait()?;
            let before = self.workers.values().filter(|w| w.ready).count();
            self.reap()?;
            if self.workers.values().filter(|w| w.ready).count() < before {
                return Err(Error::failed("a clone ended while the clones were let go"));
            }
        }
        Ok(())
    }

    fn drain_or_wait(&mut self) -> Result<()> {
        let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        if poll(&mut [PollFd::new(&self.heard.as_fd(), PollFlags::IN)], Some(&moment)).is_ok_and(|n| n > 0) {
            self.listen()?;
        }
        Ok(())
    }
}

fn tell(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|e| Error::io("cannot tell the launcher", "standard output", e))
}
