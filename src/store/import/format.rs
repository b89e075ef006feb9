//! What a source is, from its first bytes.

use super::ImportFormat;
use super::reader::Input;
use crate::error::{Error, Result};
use crate::store::FileKind;

/// First bytes of a Firecracker state file on x86-64 (little endian 0x0710_1984_8664_0000).
const FIRECRACKER_STATE: [u8; 8] = [0x00, 0x00, 0x64, 0x86, 0x84, 0x19, 0x10, 0x07];

/// Containers that hold guest memory but are not guest memory.
const CONTAINERS: [(&[u8], &str, &str); 7] = [
    (b"QFI\xfb", "a qcow2 image", "import the guest's RAM, not its disk"),
    (b"\x7fELF", "an ELF file (a core dump?)", "write the RAM as a plain file: stencil capture does"),
    (b"QEVM", "a QEMU migration stream", "stencil capture takes RAM and state apart"),
    (b"KDUMP   ", "a kdump file", "write the RAM as a plain file"),
    (b"\x1f\x8b", "compressed by gzip", "pipe it: zcat FILE | stencil import - NAME"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "pipe it: zstdcat FILE | stencil import - NAME"),
    (b"\xfd7zXZ\0", "compressed by xz", "pipe it: xzcat FILE | stencil import - NAME"),
];

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
            match state.head() {
                Some(head) if head.starts_with(&FIRECRACKER_STATE) => Ok(()),
                Some(_) => Err(Error::usage("the state file is not from Firecracker on x86-64")
                    .at(state.origin())
                    .remedy("use --format raw to import it as it is")),
                None => Err(Error::usage("a pipe cannot be checked for a Firecracker state")
                    .at(state.origin())
                    .remedy("name files, or use --format raw")),
            }
        }
    }
}

fn no_container(input: &Input) -> Result<()> {
    let Some(head) = input.head() else { return Ok(()) };
    match CONTAINERS.iter().find(|(magic, _, _)| head.starts_with(magic)) {
        None => Ok(()),
        Some((_, what, remedy)) => Err(Error::usage(format!("the source is {what}, not guest memory"))
            .at(input.origin())
            .remedy(format!("{remedy}; or use --format raw to import it as it is"))),
    }
}
