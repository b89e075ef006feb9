//! A simulated clone: maps the template as a VMM does, touches pages, and sleeps until it is killed.

use std::os::fd::OwnedFd;

use super::job::{Job, Mapped};
use super::simulate::Simulate;
use crate::error::{Error, Result};
use crate::memory::Backend;
use crate::sys::process;
use crate::units::{MemoryOffset, PAGE_SIZE, PageIndex};

/// The worker's ends of its pipes to the zygote.
#[derive(Debug)]
pub struct Pipes {
    /// Messages to the zygote, one line per write.
    pub messages: OwnedFd,
    /// Each byte from the zygote releases one ready worker.
    pub release: OwnedFd,
    /// Never carries data; its EOF means that the zygote died, so that a worker paused at a fault may die too.
    pub fault: OwnedFd,
}

/// Runs the worker in its forked process. Never returns.
pub fn run(job: &Job, index: u32, zygote: u32, pipes: Pipes) -> ! {
    // The name is for `ps` only, so a failure does not matter.
    let _ = rustix::thread::set_name(c"stencil-clone");
    let outcome = process::set_parent_death_signal(zygote).and_then(|alive| {
        if !alive {
            process::leave(1);
        }
        live(job, index, &pipes)
    });
    match outcome {
        Ok(backends) => {
            drop(pipes);
            // Keeps the mappings for the lifetime of the process.
            std::mem::forget(backends);
            process::sleep_until_killed()
        }
        Err(error) => {
            send(&pipes, &format!("failed {index} {error}"));
            process::leave(1)
        }
    }
}

fn live(job: &Job, index: u32, pipes: &Pipes) -> Result<Vec<Backend>> {
    leave_standard_streams()?;
    let mut backends = Vec::with_capacity(job.files.len());
    for file in &job.files {
        backends.push(Backend::create_with_zeros(&file.plan, &file.zeros)?);
    }
    let place = job.files.iter().position(|f| f.name == job.touch);
    if let Some((file, backend)) = place.and_then(|at| job.files.get(at).zip(backends.get(at))) {
        if file.rom && job.touched.written_pages > 0 {
            watch_rom(file, backend, index, pipes)?;
        }
        for pages in &job.prefault {
            backend.prefault_writes(PageIndex::new(pages.start)..PageIndex::new(pages.end))?;
        }
        touch(&job.simulate, job, index, backend)?;
    }
    send(pipes, &format!("ready {index}"));
    wait_for_release(pipes)?;
    process::clear_parent_death_signal()?;
    send(pipes, &format!("free {index}"));
    Ok(backends)
}

/// Replaces the standard streams with /dev/null, so that the process does not keep inherited pipes open.
pub(super) fn leave_standard_streams() -> Result<()> {
    let failed =
        |e: rustix::io::Errno| Error::failed("cannot replace the standard streams").because(e.into());
    let null =
        rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).map_err(failed)?;
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(&null).map_err(failed)
}

fn touch(simulate: &Simulate, job: &Job, index: u32, backend: &Backend) -> Result<()> {
    let pages = simulate.pages(backend.len(), index);
    let written = job.touched.written_pages;
    // A fault on a read maps a huge folio of the page cache as a whole, unless an earlier write has split the range.
    for place in written..written + job.touched.read_pages {
        backend.touch(PageIndex::new(pages.at(place)))?;
    }
    for place in 0..written {
        let page = pages.at(place);
        // Unique for each page of each clone, so that only a private copy of the page can hold the value.
        let value = (page << 24) ^ (u64::from(index) << 8) ^ 0xa5;
        for (offset, byte) in value.to_le_bytes().into_iter().enumerate() {
            backend.poke(MemoryOffset::new(page * PAGE_SIZE + offset as u64), byte)?;
        }
    }
    Ok(())
}

/// Makes the worker report its address range and pause at the fault of a ROM write, so that the zygote can inspect its
/// pages before the worker dies of SIGSEGV.
fn watch_rom(file: &Mapped, backend: &Backend, index: u32, pipes: &Pipes) -> Result<()> {
    let range = backend.address_range();
    let message = format!("fault {index} {} {} {}\n", range.start, range.end, file.name);
    process::pause_at_fault(&pipes.messages, &pipes.fault, message.into_bytes().leak())
}

/// Sends one line in one write, so that lines of several workers do not interleave.
fn send(pipes: &Pipes, line: &str) {
    let line: String = line.chars().filter(|c| *c != '\n').take(1000).chain(['\n']).collect();
    // Fails only if the zygote died; the parent death signal then ends this process.
    let _ = rustix::io::write(&pipes.messages, line.as_bytes());
}

fn wait_for_release(pipes: &Pipes) -> Result<()> {
    let mut byte = [0];
    loop {
        match rustix::io::read(&pipes.release, &mut byte) {
            Ok(1) => return Ok(()),
            Ok(_) => return Err(Error::failed("the launch was cancelled")),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot wait for the launcher").because(e.into())),
        }
    }
}
