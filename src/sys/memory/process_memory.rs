//! Reading the memory of another process through `/proc/PID/mem`. A read copies no page and changes no page table entry
//! of a present page.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::sys::process::tasks;

/// The memory of one process.
#[derive(Debug)]
pub struct ProcessMemory {
    file: File,
    pid: u32,
}

impl ProcessMemory {
    /// Opens the memory of a process. The value refers to that process even after its pid is reused.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the process has exited, and an error without
    /// permission to inspect the process.
    pub fn open(pid: u32) -> Result<ProcessMemory> {
        let opened = tasks::through_memory(pid, |directory| {
            let file = File::open(directory.join("mem"))?;
            Ok(tasks::has_memory(directory)?.then_some(file))
        });
        let opened =
            opened.map_err(|e| Error::io("cannot open the memory of", format!("/proc/{pid}/mem"), e))?;
        let file = opened.ok_or_else(|| Error::not_found(format!("process {pid} has exited")))?;
        Ok(ProcessMemory { file, pid })
    }

    /// Fills `out` with the bytes at an address. Returns false if the process does not map them any more.
    ///
    /// # Errors
    /// Returns an error if the memory cannot be read.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<bool> {
        match self.file.read_exact_at(out, address) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EIO) || e.kind() == io::ErrorKind::UnexpectedEof => {
                Ok(false)
            }
            Err(e) => {
                Err(Error::failed(format!("cannot read the memory of process {}", self.pid)).because(e))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mapped_memory_only() {
        let memory = ProcessMemory::open(std::process::id()).unwrap();
        let (bytes, mut read) = ([7u8; 16], [0u8; 16]);
        assert!(memory.read(bytes.as_ptr() as u64, &mut read).unwrap());
        assert_eq!(read, bytes);
        assert!(!memory.read(4096, &mut read).unwrap());
    }
}
