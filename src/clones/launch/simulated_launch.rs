//! Simulated launches, the launcher's side: sends start requests to a zygote and receives its status messages.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::active_launch::ActiveLaunch;
use super::job::{self, OrderFile};
use super::order::{LaunchRequest, Launched};
use super::simulate::Simulate;
use crate::clones::helper_process::session;
use crate::clones::launch::zygote;
use crate::clones::registry::{self, Entry, SharedRecord, process_tree};
use crate::error::{Error, Result};
use crate::memory::zero_runs;
use crate::store::{FileKind, Store, TemplateFile};
use crate::sys::poll::poll_for;
use crate::sys::process::ProcessId;
use crate::sys::process::session::Child;
use crate::units::{Bytes, PAGE_SIZE};

/// Interval of the checks whether the launch was cancelled.
const CANCEL_INTERVAL: Duration = Duration::from_millis(50);

/// Maximum number of start requests that the zygote has not answered. They fit into 4 KiB, the smallest pipe, so that
/// this process does not wait for the zygote while the zygote waits for this process. `cancel` requests are not
/// counted.
const MAX_REQUESTS: usize = 300;

/// Time limit for the zygote to release all clones.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);

/// Ready clones that are still bound to their zygote: unless released, they die with it.
pub struct Held {
    zygote: Child,
    input: PipeWriter,
    output: PipeReader,
    errors: PipeReader,
    /// The beginning of a message whose end was not received yet.
    partial: Vec<u8>,
}

impl Held {
    /// Releases all clones from the zygote.
    ///
    /// # Errors
    /// Returns an error if the zygote dies or does not confirm the release within 60 s.
    pub fn release(mut self) -> Result<()> {
        let lost = |e| {
            Error::failed("cannot communicate with the process that starts the simulated clones").because(e)
        };
        writeln!(self.input, "release").map_err(lost)?;
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::failed(format!(
                    "the process that starts the simulated clones did not release them{}",
                    self.error_output()
                )));
            }
            if self.receive(left)?.iter().any(|message| message == "released") {
                break;
            }
        }
        self.zygote.wait().map(drop).map_err(lost)
    }

    /// Returns the messages that arrive next; none after `timeout`.
    fn receive(&mut self, timeout: Duration) -> Result<Vec<String>> {
        match poll_for(&mut [PollFd::new(&self.output, PollFlags::IN)], Some(timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(vec![]),
            Ok(_) => {}
            Err(e) => return Err(self.died().because(e.into())),
        }
        let mut buffer = [0; 16 << 10];
        let length = self.output.read(&mut buffer).map_err(|e| self.died().because(e))?;
        if length == 0 {
            return Err(self.died());
        }
        self.partial.extend(buffer.iter().take(length));
        let end = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let complete: Vec<u8> = self.partial.drain(..end).collect();
        Ok(String::from_utf8_lossy(&complete).lines().map(str::to_owned).collect())
    }

    /// Returns the error for a zygote that died.
    fn died(&mut self) -> Error {
        Error::failed(format!("the process that starts the simulated clones died{}", self.error_output()))
    }

    /// Kills the zygote and returns its error output, as a suffix of a message.
    fn error_output(&mut self) -> String {
        let _ = self.zygote.kill();
        let mut text = String::new();
        let _ = (&mut self.errors).take(1000).read_to_string(&mut text);
        let _ = self.zygote.wait();
        if text.is_empty() { text } else { format!(": {}", text.trim_end()) }
    }
}

impl Drop for Held {
    /// Kills the zygote, and with it all clones that were not released.
    fn drop(&mut self) {
        if !matches!(self.zygote.try_wait(), Ok(Some(_))) {
            let _ = self.zygote.kill();
            let _ = self.zygote.wait();
        }
    }
}

/// A zygote that has its job and no clone.
pub struct Zygote {
    job: job::Order,
    held: Held,
}

/// Starts the zygote of a launch.
///
/// # Errors
/// Returns an error if the template has no memory file to touch, or the zygote cannot be started.
pub fn start(order: &LaunchRequest<'_>, simulate: &Simulate) -> Result<Zygote> {
    let job = job_of(order, simulate)?;
    let held = start_process(&job)?;
    Ok(Zygote { job, held })
}

/// Launches simulated clones and waits until each is ready or has failed.
///
/// # Errors
/// Returns an error if the zygote dies or the records cannot be written.
pub fn launch(active: &ActiveLaunch<'_>, zygote: Zygote) -> Result<(Launched, Held)> {
    let Zygote { job, mut held } = zygote;
    let mut record = active.create_shared(job.touched, job.log())?;
    let mut clones = Clones::default();
    let mut next = 0;
    loop {
        let mut requests = String::new();
        while next < active.order.count
            && clones.starting.len() < active.order.parallel.max(1) as usize
            && clones.requested.len() < MAX_REQUESTS
            && !active.is_over()
        {
            requests.push_str(&format!("start {next}\n"));
            clones.starting.insert(next, Instant::now() + active.order.ready_timeout);
            clones.requested.insert(next);
            next += 1;
        }
        held.input.write_all(requests.as_bytes()).map_err(|e| held.died().because(e))?;
        if clones.starting.is_empty() || active.is_over() {
            break;
        }
        let messages = held.receive(CANCEL_INTERVAL)?;
        clones.record_started(&mut record, &messages)?;
        for line in messages {
            clones.handle_message(active, &mut record, &line)?;
        }
        let late: Vec<u32> =
            clones.starting.iter().filter(|(_, d)| Instant::now() > **d).map(|(i, _)| *i).collect();
        for index in late {
            clones.starting.remove(&index);
            // The zygote kills this worker before it releases the others, even if the messages of the worker were not
            // read.
            writeln!(held.input, "cancel {index}").map_err(|e| held.died().because(e))?;
            if let Some(entry) = clones.started.remove(&index) {
                process_tree::kill(std::slice::from_ref(&entry))?;
                record.remove(index)?;
            }
            let seconds = active.order.ready_timeout.as_secs_f64();
            active.failed(index, format!("timed out after {seconds} s waiting for the clone"), None);
        }
    }
    let failures = active.gathered(|g| std::mem::take(&mut g.failures));
    Ok((Launched { clones: clones.ready, failures, clocks: vec![], children: vec![] }, held))
}

/// The clones of a launch by index, one field for each state.
#[derive(Default)]
struct Clones {
    /// Clones that the zygote was asked to start and about which it has sent no message.
    requested: BTreeSet<u32>,
    /// Ends of the timeouts of requested clones that are not ready.
    starting: BTreeMap<u32, Instant>,
    /// Clones that have a process and are not ready.
    started: BTreeMap<u32, Entry>,
    ready: Vec<Entry>,
}

impl Clones {
    /// Records the clones that the zygote has started, all with one write.
    fn record_started(&mut self, record: &mut SharedRecord, messages: &[String]) -> Result<()> {
        let mut processes = Vec::new();
        for line in messages {
            let Some((index, "started", rest)) = parts(line) else { continue };
            let process = rest.split_once(' ').and_then(|(pid, identity)| {
                Some(ProcessId { pid: pid.parse().ok()?, identity: identity.parse().ok()? })
            });
            let process = process.ok_or_else(|| Error::failed(format!("invalid message '{line}'")))?;
            self.requested.remove(&index);
            // A clone past its timeout gets no record: the zygote was told to kill the process.
            if self.starting.contains_key(&index) {
                processes.push((index, process));
            }
        }
        if !processes.is_empty() {
            let entries = record.add(&processes)?;
            self.started.extend(entries.into_iter().map(|entry| (entry.index, entry)));
        }
        Ok(())
    }

    fn handle_message(
        &mut self,
        active: &ActiveLaunch<'_>,
        record: &mut SharedRecord,
        line: &str,
    ) -> Result<()> {
        let Some((index, verb, rest)) = parts(line) else { return Ok(()) };
        self.requested.remove(&index);
        match verb {
            "ready" => {
                self.starting.remove(&index);
                if let Some(entry) = self.started.remove(&index) {
                    active.progress.advance(Bytes::new(1));
                    self.ready.push(entry);
                }
            }
            "failed" => {
                let was_starting = self.starting.remove(&index).is_some();
                // A clone can fail after it was ready.
                let failed = self.started.remove(&index).or_else(|| {
                    let place = self.ready.iter().position(|e| e.index == index)?;
                    Some(self.ready.swap_remove(place))
                });
                if failed.is_some() {
                    record.remove(index)?;
                }
                if was_starting || failed.is_some() {
                    active.failed(index, rest.to_owned(), None);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Splits a message of the zygote: the index, the verb and the rest.
fn parts(line: &str) -> Option<(u32, &str, &str)> {
    let mut words = line.splitn(3, ' ');
    let (verb, index) = (words.next()?, words.next()?);
    Some((index.parse().ok()?, verb, words.next().unwrap_or_default()))
}

fn job_of(order: &LaunchRequest<'_>, simulate: &Simulate) -> Result<job::Order> {
    let target = order.target;
    let memory: Vec<&TemplateFile> = target.files.iter().filter(|f| f.kind.is_memory()).collect();
    let touch = match &simulate.file {
        Some(name) => memory.iter().find(|f| &f.name == name).ok_or_else(|| {
            Error::usage(format!("template {} has no memory file '{name}'", target.name))
                .hint("list the files of the template with `stencil inspect`")
        })?,
        None => memory
            .iter()
            .find(|f| f.kind == FileKind::Ram)
            .or(memory.first())
            .ok_or_else(|| Error::usage(format!("template {} has no memory file", target.name)))?,
    };
    let touched = simulate.touched(touch.size)?;
    let template = Store::open(&target.store.path)?.template(&target.digest)?;
    let file = |f: &&TemplateFile| {
        let rom = f.kind == FileKind::Rom;
        let data = template.find_file(&f.name).and_then(|file| template.data_byte_ranges(file))?;
        let zeros = if rom { Vec::new() } else { zero_runs(&data, f.size.get().next_multiple_of(PAGE_SIZE)) };
        Ok(OrderFile { name: f.name.clone(), path: target.dir.join(&f.name), size: f.size.get(), rom, zeros })
    };
    let files = memory.iter().map(file).collect::<Result<_>>()?;
    let last = touch.size.get().div_ceil(PAGE_SIZE);
    let written = order.prefault.get(&touch.name);
    let in_file = written.into_iter().flatten().map(|pages| pages.start.min(last)..pages.end.min(last));
    let prefault = in_file.filter(|pages| !pages.is_empty()).collect();
    let touch = touch.name.clone();
    Ok(job::Order { simulate: simulate.to_string(), files, touch, touched, prefault })
}

fn start_process(order: &job::Order) -> Result<Held> {
    let failed = |e| Error::failed("cannot start the process that starts the simulated clones").because(e);
    let start = || -> io::Result<Held> {
        let ((its_input, input), (output, its_output)) = (io::pipe()?, io::pipe()?);
        let (errors, its_errors) = io::pipe()?;
        // A small environment saves memory: a large one would cost every worker a page.
        let mut session = session();
        session
            .arg(zygote::ARGUMENT)
            .clear_env()
            .env("STENCIL_RUNTIME_DIR", registry::runtime_root())
            .envs(std::env::var_os("STENCIL_TEST_RUN").map(|run| ("STENCIL_TEST_RUN", run)));
        let zygote = session.spawn([its_input.as_fd(), its_output.as_fd(), its_errors.as_fd()])?;
        Ok(Held { zygote, input, output, errors, partial: vec![] })
    };
    let mut held = start().map_err(failed)?;
    let job = serde_json::to_string(order)
        .map_err(|e| Error::failed(format!("cannot encode the job of the simulated clones: {e}")))?;
    writeln!(held.input, "{job}").map_err(failed)?;
    Ok(held)
}
