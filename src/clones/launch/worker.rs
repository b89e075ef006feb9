//! A simulated clone: maps the template as a VMM would, touches its pages, and stays.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::simulate::Simulate;
use super::zygote::{Job, Mapped};
use crate::clones::registry::open_log;
use crate::error::{Error, Result};
use crate::memory::Backend;
use crate::sys::process;
use crate::units::{MemoryOffset, PAGE_SIZE, PageIndex};

/// The ends of the pipes between a worker and its zygote.
#[derive(Debug)]
pub struct Pipes {
    /// What the worker says, one line a write.
    pub say: OwnedFd,
    /// One byte lets one ready worker go.
    pub release: OwnedFd,
    /// Its end lets the workers die of their faults that nobody looks at any more.
    pub fault: OwnedFd,
}

/// Runs the worker in a process that was forked for it. Never returns.
pub fn run(job: &Job, index: u32, dir: &Path, zygote: u32, pipes: Pipes) -> ! {
    // The name is for `ps`; without it the clone works as well.
    let _ = rustix::thread::set_name(c"stencil-clone");
    let outcome = process::die_with_parent(zygote).and_then(|alive| {
        if !alive {
            process::leave(1);
        }
        live(job, index, dir, &pipes)
    });
    match outcome {
        Ok(backends) => {
            drop(pipes);
            // The mappings are what this process is for.
            std::mem::forget(backends);
            process::sleep_until_killed()
        }
        Err(error) => {
            say(&pipes, &format!("failed {index} {error}"));
            process::leave(1)
        }
    }
}

fn live(job: &Job, index: u32, dir: &Path, pipes: &Pipes) -> Result<Vec<Backend>> {
    leave_standard_streams()?;
    let mut backends = Vec::with_capacity(job.files.len());
    for file in &job.files {
        backends.push(Backend::create(&file.plan)?);
    }
    let place = job.files.iter().position(|f| f.name == job.touch);
    if let Some((file, backend)) = place.and_then(|at| job.files.get(at).zip(backends.get(at))) {
        if file.rom && job.touched.written_pages > 0 {
            watch_rom(file, backend, index, pipes)?;
        }
        touch(&job.simulate, job, index, backend)?;
    }
    log(dir, job, index)?;
    say(pipes, &format!("ready {index}"));
    wait_for_release(pipes)?;
    process::outlive_parent()?;
    say(pipes, &format!("free {index}"));
    Ok(backends)
}

/// The pipes of the zygote's standard streams must not be held open for a clone's life.
pub(super) fn leave_standard_streams() -> Result<()> {
    let failed = |e: rustix::io::Errno| Error::failed("cannot leave the standard streams").because(e.into());
    let null =
        rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).map_err(failed)?;
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(&null).map_err(failed)
}

fn touch(simulate: &Simulate, job: &Job, index: u32, backend: &Backend) -> Result<()> {
    let pages = simulate.pages(backend.len(), index);
    let written = job.touched.written_pages;
    for place in 0..written {
        let page = pages.at(place);
        // Bytes that no other page of any clone has, so that nothing but a real copy can hold them.
        let value = (page << 24) ^ (u64::from(index) << 8) ^ 0xa5;
        for (offset, byte) in value.to_le_bytes().into_iter().enumerate() {
            backend.poke(MemoryOffset::new(page * PAGE_SIZE + offset as u64), byte)?;
        }
    }
    for place in written..written + job.touched.read_pages {
        backend.touch(PageIndex::new(pages.at(place)))?;
    }
    Ok(())
}

/// ROM cannot be written: this clone will die of it, and the zygote looks at its pages before.
fn watch_rom(file: &Mapped, backend: &Backend, index: u32, pipes: &Pipes) -> Result<()> {
    let range = backend.address_range();
    let words = format!("fault {index} {} {} {}\n", range.start, range.end, file.name);
    process::pause_at_fault(&pipes.say, &pipes.fault, words.into_bytes().leak())
}

fn log(dir: &Path, job: &Job, index: u32) -> Result<()> {
    let path = dir.join("log");
    let failed = |e| Error::io("cannot write the log of a clone", &path, e);
    let mut file = open_log(dir)?;
    for mapped in &job.files {
        writeln!(file, "mapped {} as {}", mapped.path.display(), if mapped.rom { "rom" } else { "ram" })
            .map_err(failed)?;
    }
    let touched = job.touched;
    writeln!(
        file,
        "clone {index}: read {} pages, wrote {} pages of {}",
        touched.read_pages, touched.written_pages, job.touch
    )
    .map_err(failed)
}

/// One line in one write, so that lines of several workers do not mix.
fn say(pipes: &Pipes, line: &str) {
    let line: String = line.chars().filter(|c| *c != '\n').take(1000).chain(['\n']).collect();
    // Without a listener there is nobody to tell: the death signal ends this process.
    let _ = rustix::io::write(&pipes.say, line.as_bytes());
}

fn wait_for_release(pipes: &Pipes) -> Result<()> {
    let mut byte = [0];
    loop {
        match rustix::io::read(&pipes.release, &mut byte) {
            Ok(1) => return Ok(()),
            Ok(_) => return Err(Error::failed("the launch was given up")),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot wait for the launcher").because(e.into())),
        }
    }
}
