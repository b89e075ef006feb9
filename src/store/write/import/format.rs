//! Checks that the sources have the requested import format.

use super::firecracker::{FirecrackerState, MAX_STATE_BYTES};
use super::input::Input;
use super::magic::identify;
use super::request::ImportFormat;
use crate::error::{Error, Result};
use crate::store::FileKind;

/// Checks that the sources have the requested format.
pub(super) fn check_format(format: ImportFormat, inputs: &[Input]) -> Result<()> {
    match format {
        ImportFormat::Raw => Ok(()),
        ImportFormat::Auto => inputs.iter().filter(|i| i.kind == FileKind::Ram).try_for_each(no_container),
        ImportFormat::Firecracker => {
            let [memory, state] = ["memory", "state"].map(|name| inputs.iter().find(|i| i.name == name));
            let (Some(memory), Some(state)) = (memory, state) else {
                return Err(Error::usage("a Firecracker snapshot needs a memory file and a state file")
                    .hint("run 'stencil import MEMORY NAME --state STATE --format firecracker'"));
            };
            no_container(memory)?;
            firecracker_state(state)?;
            firecracker_memory(memory)
        }
    }
}

fn firecracker_state(input: &Input) -> Result<()> {
    let Some(bytes) = input.whole(MAX_STATE_BYTES)? else { return Err(from_a_pipe(input)) };
    let wrong = |why: String, remedy: &str| {
        Error::usage(format!("the state file {why}"))
            .at(input.origin())
            .hint(format!("{remedy}, or import the file unchecked with --format raw"))
    };
    let state = FirecrackerState::whole(&bytes).map_err(|why| wrong(why, "take the snapshot again"))?;
    let (guest, host) = (state.machine, std::env::consts::ARCH);
    match guest == host {
        true => Ok(()),
        false => Err(wrong(
            format!("is for a guest on {guest}, but this host is {host}"),
            &format!("import on a host of the architecture {guest}"),
        )),
    }
}

/// Firecracker writes every byte of a full snapshot, except unplugged hotpluggable memory. Holes therefore mean that
/// pages are missing, or the file cannot be told from one with missing pages.
fn firecracker_memory(input: &Input) -> Result<()> {
    let Some(size) = input.size() else { return Err(from_a_pipe(input)) };
    if !size.is_multiple_of(1 << 20) {
        return Err(Error::usage(format!("invalid size {size} of the memory file: not a multiple of 1 MiB"))
            .at(input.origin())
            .hint("check that the file is complete, or import the file unchecked with --format raw"));
    }
    let holes = input.hole_bytes()?;
    if holes == 0 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{holes} of {size} bytes of the memory file are holes: the file is a diff snapshot, or a full one that has \
         unplugged memory or was copied sparsely"
    ))
    .at(input.origin())
    .hint(
        "merge a diff snapshot into its base with 'snapshot-editor edit-memory rebase --memory-path BASE --diff-path \
         FILE'; copy a full snapshot with 'cp --sparse=never', or import the file unchecked with --format raw",
    ))
}

fn from_a_pipe(input: &Input) -> Error {
    Error::usage("cannot check a pipe for a Firecracker snapshot")
        .at(input.origin())
        .hint("write the snapshot to regular files, or import the pipe unchecked with --format raw")
}

fn no_container(input: &Input) -> Result<()> {
    match input.ends()? {
        Some((head, tail)) => plain(input, &head, &tail),
        None => Ok(()),
    }
}

/// Rejects a source with the magic bytes of a format that is not plain RAM.
///
/// # Errors
/// Returns a usage error that names the format and how to convert it.
pub(super) fn plain(input: &Input, head: &[u8], tail: &[u8]) -> Result<()> {
    match identify(head, tail) {
        None => Ok(()),
        Some((what, remedy)) => Err(Error::usage(format!("the source is not plain guest memory but {what}"))
            .at(input.origin())
            .hint(format!("{remedy}; or import the source unchecked with --format raw"))),
    }
}
