//! Compares what the user says a source is with what it looks like.

use super::ImportFormat;
use super::magic::known;
use super::reader::Input;
use crate::error::{Error, Result};
use crate::store::FileKind;
use crate::store::firecracker::{FirecrackerState, LONGEST_STATE};

/// Compares what the user says the sources are with what they look like.
pub(super) fn check_format(format: ImportFormat, inputs: &[Input]) -> Result<()> {
    match format {
        ImportFormat::Raw => Ok(()),
        ImportFormat::Auto => inputs.iter().filter(|i| i.kind == FileKind::Ram).try_for_each(no_container),
        ImportFormat::Firecracker => {
            let [memory, state] = ["memory", "state"].map(|name| inputs.iter().find(|i| i.name == name));
            let (Some(memory), Some(state)) = (memory, state) else {
                return Err(Error::usage("a Firecracker snapshot is a memory file and a state file")
                    .remedy("stencil import MEMORY NAME --state STATE --format firecracker"));
            };
            no_container(memory)?;
            firecracker_state(state)?;
            firecracker_memory(memory)
        }
    }
}

fn firecracker_state(input: &Input) -> Result<()> {
    let Some(bytes) = input.whole(LONGEST_STATE)? else { return Err(from_a_pipe(input)) };
    let wrong = |why: String| {
        Error::usage(format!("the state file {why}"))
            .at(input.origin())
            .remedy("make the snapshot again, or use --format raw to import it as it is")
    };
    let state = FirecrackerState::whole(&bytes).map_err(wrong)?;
    match state.machine == std::env::consts::ARCH {
        true => Ok(()),
        false => Err(wrong(format!(
            "is of a guest on {}, and this host is {}",
            state.machine,
            std::env::consts::ARCH
        ))),
    }
}

/// Firecracker writes every byte of a full snapshot, but for hotpluggable memory that is not plugged; so holes mean that
/// pages are missing, or look the same.
fn firecracker_memory(input: &Input) -> Result<()> {
    let Some(size) = input.size() else { return Err(from_a_pipe(input)) };
    if !size.is_multiple_of(1 << 20) {
        return Err(Error::usage(format!(
            "the memory file has {size} bytes; Firecracker's is a multiple of 1 MiB"
        ))
        .at(input.origin())
        .remedy("check that it is whole, or use --format raw to import it as it is"));
    }
    let holes = input.hole_bytes()?;
    if holes == 0 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "the memory file has holes, {holes} of {size} bytes: it is a diff snapshot, or a full one with memory \
         that is not plugged or that was copied with holes"
    ))
    .at(input.origin())
    .remedy(
        "merge a diff snapshot into its base: snapshot-editor edit-memory rebase --memory-path BASE --diff-path FILE; \
         a full one can be copied again by cp --sparse=never, or imported by --format raw",
    ))
}

fn from_a_pipe(input: &Input) -> Error {
    Error::usage("a pipe cannot be checked for a Firecracker snapshot")
        .at(input.origin())
        .remedy("name files, or use --format raw")
}

fn no_container(input: &Input) -> Result<()> {
    match input.ends()? {
        Some((head, tail)) => plain(input, &head, &tail),
        None => Ok(()),
    }
}

/// Refuses what is known not to be plain RAM.
///
/// # Errors
/// A usage error with what it is, and what to do with it.
pub(super) fn plain(input: &Input, head: &[u8], tail: &[u8]) -> Result<()> {
    match known(head, tail) {
        None => Ok(()),
        Some((what, remedy)) => Err(Error::usage(format!("the source is {what}, not plain guest memory"))
            .at(input.origin())
            .remedy(format!("{remedy}; or use --format raw to import it as it is"))),
    }
}
