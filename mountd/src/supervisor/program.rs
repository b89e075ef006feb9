//! The program file that servers are started from.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// An open program file. Replacing the file at its path later has no effect.
#[derive(Debug)]
pub struct Program {
    /// The open file.
    pub file: OwnedFd,
    /// The path of the file when it was opened.
    pub path: PathBuf,
}

impl Program {
    /// Creates a program from the descriptor of its file.
    pub fn new(file: OwnedFd) -> Program {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(link).unwrap_or_default();
        Program { file, path }
    }

    /// Opens the program that this process runs.
    ///
    /// # Errors
    /// Returns an error if `/proc/self/exe` cannot be opened.
    pub fn own() -> io::Result<Program> {
        Ok(Program::new(File::open("/proc/self/exe")?.into()))
    }
}
