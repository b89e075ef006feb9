//! Checks that the sources have the requested import format.

use super::input::Input;
use super::magic::identify;
use super::request::ImportFormat;
use crate::error::{Error, Result};
use crate::store::format::firecracker::{FirecrackerState, MAX_STATE_BYTES};
use crate::store::{FileKind, Roles};

/// Checks that the sources have the requested format. Returns warnings about them.
pub(super) fn check_format(format: ImportFormat, inputs: &[Input]) -> Result<Vec<String>> {
    if format == ImportFormat::Raw {
        return Ok(vec![]);
    }
    let head = |input: &Input| Ok::<_, Error>(input.ends()?.map_or(vec![], |(head, _)| head));
    let names = inputs.iter().map(|input| (input.name.as_str(), input.kind));
    let roles = Roles::of(names, |at| inputs.get(at).map_or(Ok(vec![]), head))?;
    let find = |name: Option<String>| inputs.iter().find(|input| Some(&input.name) == name.as_ref());
    let (memory, state) = (find(roles.memory), find(roles.state));
    let is_firecracker = match state {
        Some(state) => FirecrackerState::header(&head(state)?).is_ok(),
        None => false,
    };
    match format {
        ImportFormat::Raw | ImportFormat::Auto if !is_firecracker => {
            inputs.iter().filter(|i| i.kind == FileKind::Ram).try_for_each(no_container).map(|()| vec![])
        }
        // A diff would otherwise become a template in which zeros replace all unchanged pages.
        _ => {
            let (Some(memory), Some(state)) = (memory, state) else {
                return Err(Error::usage("a Firecracker snapshot needs a memory file and a state file")
                    .hint("run 'stencil import MEMORY NAME --state STATE --format firecracker'"));
            };
            no_container(memory)?;
            let warnings = firecracker_state(state)?;
            firecracker_memory(memory)?;
            Ok(warnings)
        }
    }
}

fn firecracker_state(input: &Input) -> Result<Vec<String>> {
    let Some(bytes) = input.whole(MAX_STATE_BYTES)? else { return Err(from_a_pipe(input)) };
    let wrong = |why: String, remedy: &str| {
        Error::usage(format!("the state file {why}"))
            .at(input.origin())
            .hint(format!("{remedy}, or import the file unchecked with --format raw"))
    };
    let state = FirecrackerState::whole(&bytes).map_err(|why| wrong(why, "take the snapshot again"))?;
    let (guest, host) = (state.machine, std::env::consts::ARCH);
    if guest != host {
        return Err(wrong(
            format!("is for a guest on {guest}, but this host is {host}"),
            &format!("import on a host of the architecture {guest}"),
        ));
    }
    Ok(state
        .newer_than_known()
        .map(|why| format!("the state file '{}' {why}", input.name))
        .into_iter()
        .collect())
}

/// Firecracker writes every byte of a full snapshot, except unplugged hotpluggable memory. Holes therefore mean that
/// pages are missing, or the file cannot be distinguished from a file with missing pages.
fn firecracker_memory(input: &Input) -> Result<()> {
    let Some(size) = input.size() else { return Err(from_a_pipe(input)) };
    if !size.is_multiple_of(1 << 20) {
        return Err(Error::usage(format!("invalid size {size} of the memory file: not a multiple of 1 MiB"))
            .at(input.origin())
            .hint("check that the file is complete, or import the file unchecked with --format raw"));
    }
    let holes = input.hole_bytes()?;
    if holes == 0 || input.is_diff {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{holes} of {size} bytes of the memory file are holes: the file is a diff snapshot, or a full snapshot \
         that has unplugged memory or was copied sparsely"
    ))
    .at(input.origin())
    .hint(
        "import a diff snapshot with --base T, where T is the template of its base; copy a full snapshot with 'cp \
         --sparse=never', or import the file unchecked with --format raw",
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
