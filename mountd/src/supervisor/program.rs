//! The program that servers are started from.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// An open program: replacing the file on disk later changes nothing.
#[derive(Debug)]
pub struct Program {
    /// The open binary.
    pub file: OwnedFd,
    /// Its path when it was opened.
    pub path: PathBuf,
}

impl Program {
    /// The program behind a descriptor.
    pub fn new(file: OwnedFd) -> Program {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(link).unwrap_or_default();
        Program { file, path }
    }

    /// The program that this process runs.
    ///
    /// # Errors
    /// Returns an error if it cannot be opened.
    pub fn own() -> io::Result<Program> {
        Ok(Program::new(File::open("/proc/self/exe")?.into()))
    }
}
