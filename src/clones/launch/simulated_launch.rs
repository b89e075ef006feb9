//! Simulated launches, the launcher's side: sends start requests to a zygote and receives its status messages.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::active_launch::ActiveLaunch;
use super::job::{self, OrderFile};
use super::order::Launched;
use super::simulate::Simulate;
use crate::clones::helper_process::this_program;
use crate::clones::launch::zygote;
use crate::clones::registry::{self, Entry, Touched};
use crate::error::{Error, Result};
use crate::store::{FileKind, TemplateFile};
use crate::sys::process::threads;
use crate::sys::process::{ProcessId, own_session};
use crate::units::Bytes;

/// Ready clones that are still bound to their zygote: unless released, they die with it.
pub struct Held {
    zygote: Child,
    input: ChildStdin,
    messages: Receiver<String>,
}

impl Held {
    /// Releases all clones from the zygote.
    ///
    /// # Errors
    /// Returns an error if the zygote does not confirm the release within 60 s.
    pub fn release(mut self) -> Result<()> {
        let lost = |e| {
            Error::failed("cannot communicate with the process that starts the simulated clones").because(e)
        };
        writeln!(self.input, "release").map_err(lost)?;
        loop {
            match self.messages.recv_timeout(Duration::from_secs(60)) {
                Ok(line) if line == "released" => break,
                Ok(_) => {}
                Err(_) => {
                    return Err(Error::failed(format!(
                        "the process that starts the simulated clones did not release them{}",
                        self.error_output()
                    )));
                }
            }
        }
        self.zygote.wait().map(drop).map_err(lost)
    }

    /// Returns the error for a zygote that died.
    fn died(&mut self) -> Error {
        Error::failed(format!("the process that starts the simulated clones died{}", self.error_output()))
    }

    /// Kills the zygote and returns its error output, as a suffix of a message.
    fn error_output(&mut self) -> String {
        let _ = self.zygote.kill();
        let mut text = String::new();
        if let Some(stderr) = &mut self.zygote.stderr {
            let _ = stderr.take(1000).read_to_string(&mut text);
        }
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

/// Launches simulated clones and waits until each is ready or has failed.
///
/// # Errors
/// Returns an error if the template has no memory file to touch, or the zygote cannot be started or dies.
pub fn launch(active: &ActiveLaunch<'_>, simulate: &Simulate) -> Result<(Launched, Held)> {
    let (order, touched) = order(&active.order.target.files, active, simulate)?;
    let mut held = start(&order)?;
    let mut entries: BTreeMap<u32, Entry> = BTreeMap::new();
    let mut starting: BTreeMap<u32, Instant> = BTreeMap::new();
    let mut ready = vec![];
    let mut next = 0;
    loop {
        while next < active.order.count
            && starting.len() < active.order.parallel.max(1) as usize
            && !active.is_over()
        {
            let entry = active.create(next, Some(touched))?;
            let line = format!("start {next} {}\n", entry.dir.display());
            held.input.write_all(line.as_bytes()).map_err(|e| held.died().because(e))?;
            starting.insert(next, Instant::now() + active.order.ready_timeout);
            entries.insert(next, entry);
            next += 1;
        }
        if starting.is_empty() || active.is_over() {
            break;
        }
        match held.messages.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => handle_message(active, &line, &mut entries, &mut starting, &mut ready)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(held.died());
            }
        }
        let late: Vec<u32> = starting.iter().filter(|(_, d)| Instant::now() > **d).map(|(i, _)| *i).collect();
        for index in late {
            starting.remove(&index);
            if let Some(entry) = entries.remove(&index) {
                entry.destroy()?;
            }
            let seconds = active.order.ready_timeout.as_secs_f64();
            active.failed(index, format!("timed out after {seconds} s waiting for the clone"), None);
        }
    }
    let failures = active.gathered(|g| std::mem::take(&mut g.failures));
    Ok((Launched { clones: ready, failures, clocks: vec![], children: vec![] }, held))
}

fn handle_message(
    active: &ActiveLaunch<'_>,
    line: &str,
    entries: &mut BTreeMap<u32, Entry>,
    starting: &mut BTreeMap<u32, Instant>,
    ready: &mut Vec<Entry>,
) -> Result<()> {
    let mut words = line.splitn(3, ' ');
    let (verb, index, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
    let Some(index) = index.and_then(|i| i.parse::<u32>().ok()) else { return Ok(()) };
    match verb {
        Some("started") => {
            let process = rest.split_once(' ').and_then(|(pid, identity)| {
                Some(ProcessId { pid: pid.parse().ok()?, identity: identity.parse().ok()? })
            });
            if let (Some(process), Some(entry)) = (process, entries.get_mut(&index)) {
                entry.set_process(process)?;
            }
        }
        Some("ready") => {
            starting.remove(&index);
            active.progress.advance(Bytes::new(1));
            ready.extend(entries.remove(&index));
        }
        Some("failed") => {
            starting.remove(&index);
            // A clone can fail after it was ready.
            let failed = entries.remove(&index).or_else(|| {
                ready.iter().position(|e| e.index == index).map(|place| ready.swap_remove(place))
            });
            if let Some(entry) = failed {
                entry.remove()?;
                active.failed(index, rest.to_owned(), None);
            }
        }
        _ => {}
    }
    Ok(())
}

fn order(
    files: &[TemplateFile],
    active: &ActiveLaunch<'_>,
    simulate: &Simulate,
) -> Result<(job::Order, Touched)> {
    let target = active.order.target;
    let memory: Vec<&TemplateFile> = files.iter().filter(|f| f.kind.is_memory()).collect();
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
    let file = |f: &&TemplateFile| OrderFile {
        name: f.name.clone(),
        path: target.dir.join(&f.name),
        size: f.size.get(),
        rom: f.kind == FileKind::Rom,
    };
    let files = memory.iter().map(file).collect();
    Ok((job::Order { simulate: simulate.to_string(), files, touch: touch.name.clone(), touched }, touched))
}

fn start(order: &job::Order) -> Result<Held> {
    let failed = |e| Error::failed("cannot start the process that starts the simulated clones").because(e);
    let mut command = this_program();
    own_session(&mut command).arg(zygote::ARGUMENT);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Saves memory: an environment would cost every worker a page.
    command.env_clear().env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command.envs(std::env::var_os("STENCIL_TEST_RUN").map(|run| ("STENCIL_TEST_RUN", run)));
    let mut zygote = command.spawn().map_err(failed)?;
    let (Some(mut input), Some(output)) = (zygote.stdin.take(), zygote.stdout.take()) else {
        return Err(Error::failed("the process that starts the simulated clones has no standard streams"));
    };
    let (sender, messages) = channel();
    threads::start(move || {
        for line in BufReader::new(output).lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    })?;
    let job = serde_json::to_string(order)
        .map_err(|e| Error::failed(format!("cannot encode the job of the simulated clones: {e}")))?;
    writeln!(input, "{job}").map_err(failed)?;
    Ok(Held { zygote, input, messages })
}
