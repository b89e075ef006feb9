//! The launcher's side of simulated clones: orders them from a zygote, and hears how they do.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::watchdog::this_program;
use super::zygote::{self, OrderFile};
use super::{Herd, Launched, Outcome, Simulate};
use crate::clones::registry::{self, Entry, Touched};
use crate::error::{Error, Result};
use crate::store::{FileKind, TemplateFile};
use crate::sys::process::{ProcessId, own_session};
use crate::sys::threads;
use crate::units::Bytes;

/// Ready clones that their zygote still holds: they die with it until they are released.
pub struct Held {
    zygote: Child,
    input: ChildStdin,
    heard: Receiver<String>,
}

impl Held {
    /// Lets all of them go.
    ///
    /// # Errors
    /// When the zygote does not confirm it.
    pub fn release(mut self) -> Result<()> {
        let lost = |e| Error::failed("cannot talk to the zygote").because(e);
        writeln!(self.input, "release").map_err(lost)?;
        loop {
            match self.heard.recv_timeout(Duration::from_secs(60)) {
                Ok(line) if line == "released" => break,
                Ok(_) => {}
                Err(_) => {
                    return Err(Error::failed(format!(
                        "the zygote did not let the clones go{}",
                        self.words()
                    )));
                }
            }
        }
        self.zygote.wait().map(drop).map_err(lost)
    }

    /// What it said of an error, once it has ended.
    fn words(&mut self) -> String {
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
    /// What was not released dies here.
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
/// When the template has no memory to touch, or the zygote cannot be started or dies.
pub fn launch(herd: &Herd<'_>, simulate: &Simulate) -> Result<Outcome> {
    let (order, touched) = order(&herd.order.target.files, herd, simulate)?;
    let mut held = start(&order)?;
    let mut entries: BTreeMap<u32, Entry> = BTreeMap::new();
    let mut under_way: BTreeMap<u32, Instant> = BTreeMap::new();
    let mut ready = vec![];
    let mut next = 0;
    loop {
        while next < herd.order.count
            && under_way.len() < herd.order.parallel.max(1) as usize
            && !herd.is_over()
        {
            let entry = herd.create(next, Some(touched))?;
            let line = format!("start {next} {}\n", entry.dir.display());
            held.input
                .write_all(line.as_bytes())
                .map_err(|e| Error::failed(format!("the zygote has gone{}", held.words())).because(e))?;
            under_way.insert(next, Instant::now() + herd.order.patience);
            entries.insert(next, entry);
            next += 1;
        }
        if under_way.is_empty() || herd.is_over() {
            break;
        }
        match held.heard.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => hear(herd, &line, &mut entries, &mut under_way, &mut ready)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed(format!("the zygote has died{}", held.words())));
            }
        }
        let late: Vec<u32> =
            under_way.iter().filter(|(_, d)| Instant::now() > **d).map(|(i, _)| *i).collect();
        for index in late {
            under_way.remove(&index);
            if let Some(entry) = entries.remove(&index) {
                entry.destroy()?;
            }
            herd.failed(index, format!("it was not ready after {} s", herd.order.patience.as_secs_f64()));
        }
    }
    let failures = herd.gathered(|g| std::mem::take(&mut g.failures));
    Ok((Launched { clones: ready, failures, clocks: vec![], children: vec![] }, Some(held)))
}

fn hear(
    herd: &Herd<'_>,
    line: &str,
    entries: &mut BTreeMap<u32, Entry>,
    under_way: &mut BTreeMap<u32, Instant>,
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
            under_way.remove(&index);
            herd.progress.advance(Bytes::new(1));
            ready.extend(entries.remove(&index));
        }
        Some("failed") => {
            under_way.remove(&index);
            // One that was ready and then ended is none of the ready ones any more.
            let gone = entries.remove(&index).or_else(|| {
                ready.iter().position(|e| e.index == index).map(|place| ready.swap_remove(place))
            });
            if let Some(entry) = gone {
                entry.remove()?;
                herd.failed(index, rest.to_owned());
            }
        }
        _ => {}
    }
    Ok(())
}

fn order(files: &[TemplateFile], herd: &Herd<'_>, simulate: &Simulate) -> Result<(zygote::Order, Touched)> {
    let target = herd.order.target;
    let memory: Vec<&TemplateFile> = files.iter().filter(|f| f.kind.is_memory()).collect();
    let touch = match &simulate.file {
        Some(name) => memory.iter().find(|f| &f.name == name).ok_or_else(|| {
            Error::usage(format!("template {} has no memory file '{name}'", target.name))
                .remedy("see its files with `stencil inspect`")
        })?,
        None => memory.iter().find(|f| f.kind == FileKind::Ram).or(memory.first()).ok_or_else(|| {
            Error::usage(format!("template {} has no memory, only other files", target.name))
        })?,
    };
    let touched = simulate.touched(touch.size)?;
    let file = |f: &&TemplateFile| OrderFile {
        name: f.name.clone(),
        path: target.dir.join(&f.name),
        size: f.size.get(),
        rom: f.kind == FileKind::Rom,
    };
    let files = memory.iter().map(file).collect();
    Ok((zygote::Order { simulate: simulate.to_string(), files, touch: touch.name.clone(), touched }, touched))
}

fn start(order: &zygote::Order) -> Result<Held> {
    let failed = |e| Error::failed("cannot start the zygote of simulated clones").because(e);
    let mut command = this_program();
    own_session(&mut command).arg(zygote::ARGUMENT);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A worker's environment is a page of its own that nothing needs.
    command.env_clear().env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command.envs(std::env::var_os("STENCIL_TEST_RUN").map(|run| ("STENCIL_TEST_RUN", run)));
    let mut zygote = command.spawn().map_err(failed)?;
    let (Some(mut input), Some(output)) = (zygote.stdin.take(), zygote.stdout.take()) else {
        return Err(Error::failed("the zygote has no standard streams"));
    };
    let (tell, heard) = channel();
    threads::start(move || {
        for line in BufReader::new(output).lines() {
            let Ok(line) = line else { break };
            if tell.send(line).is_err() {
                break;
            }
        }
    })?;
    let job = serde_json::to_string(order)
        .map_err(|e| Error::failed(format!("cannot write the job of the simulated clones: {e}")))?;
    writeln!(input, "{job}").map_err(failed)?;
    Ok(Held { zygote, input, heard })
}
