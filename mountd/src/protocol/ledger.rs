//! The ledger: a memory file with the mount state. The supervisor writes the ledger after each change that its
//! successor needs.
//!
//! Servers inherit the ledger read-only, together with all other descriptors of the mount: after the death of a
//! supervisor a new supervisor copies the descriptors from a live server.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals};
use stencilfs::control::ledger::{HALF_BYTES, HEAD_BYTES, newest};
use stencilfs::control::{CONTROL_VERSION, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::memory::memfd;
use stencilfs::units::Bytes;

use super::fds;

/// Number of attempts to read a ledger while the supervisor writes to the file. A write overwrites only the older half,
/// so an attempt fails only if two writes happen during the read.
const READ_ATTEMPTS: usize = 1000;

/// A memory file with the latest mount state, and the one before.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    /// Number of the last write; its parity selects the half of the file.
    turn: u64,
}

impl Ledger {
    /// Creates an empty ledger.
    ///
    /// # Errors
    /// Returns an error if the memory file cannot be created.
    pub fn create() -> io::Result<Ledger> {
        let file = memfd::create("stencil-ledger", Bytes::new(2 * HALF_BYTES))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // A server has no capabilities and therefore cannot reopen its read-only descriptor for writing.
        fchmod(&file, Mode::RUSR)?;
        Ok(Ledger { file: file.into(), turn: 0 })
    }

    /// Opens a ledger that another supervisor wrote, and returns its latest complete text.
    ///
    /// # Errors
    /// Returns `InvalidData` if the file is not a ledger or contains no complete text.
    fn open(file: OwnedFd) -> io::Result<(Ledger, Vec<u8>)> {
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // The descriptor of a server is read-only: reopen the file for writing.
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap_or(file));
        let (turn, text) = newest(&file).ok_or(io::ErrorKind::InvalidData)?;
        Ok((Ledger { file, turn }, text))
    }

    /// Overwrites the older half of the file with `text`.
    ///
    /// # Errors
    /// Returns `FileTooLarge` if `text` does not fit into half of the file.
    pub fn write(&mut self, text: &[u8]) -> io::Result<()> {
        if (HEAD_BYTES + text.len()) as u64 > HALF_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.turn += 1;
        let mut record = Vec::with_capacity(HEAD_BYTES + text.len());
        record.extend(self.turn.to_le_bytes());
        record.extend((text.len() as u64).to_le_bytes());
        record.extend(blake3::hash(text).as_bytes());
        record.extend(text);
        self.file.write_all_at(&record, self.turn % 2 * HALF_BYTES)
    }

    /// Opens a read-only descriptor of the ledger.
    ///
    /// # Errors
    /// Returns an error if open(2) fails.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens a ledger that another supervisor wrote, and returns the mount state in it.
///
/// # Errors
/// Returns an error if the file is not a ledger, or if the ledger has another control version.
pub fn read(file: OwnedFd) -> Result<(Ledger, Snapshot)> {
    let (ledger, text) =
        Ledger::open(file).map_err(|e| Error::failed("cannot read the ledger").because(e))?;
    Ok((ledger, parse(&text)?))
}

/// Reads the current mount state from a ledger. Makes only system calls that the sandbox of a server allows.
///
/// # Errors
/// Same as [`read`].
pub fn read_snapshot(file: &OwnedFd) -> Result<Snapshot> {
    let file = File::from(fds::copy(file)?);
    let text = (0..READ_ATTEMPTS).find_map(|_| newest(&file));
    match text {
        Some((_, text)) => parse(&text),
        None => Err(Error::failed("cannot read the ledger").because(io::ErrorKind::InvalidData.into())),
    }
}

fn parse(text: &[u8]) -> Result<Snapshot> {
    #[derive(serde::Deserialize)]
    struct Version {
        control_version: u32,
    }
    let hint = "keep the old program, or unmount and mount again with the new program";
    let fail = |e| Error::failed(format!("cannot parse the previous supervisor's state: {e}")).hint(hint);
    let Version { control_version } = serde_json::from_slice(text).map_err(fail)?;
    if control_version != CONTROL_VERSION {
        let error =
            format!("the mount uses control version {control_version}, this program uses {CONTROL_VERSION}");
        return Err(Error::failed(error).hint(hint));
    }
    serde_json::from_slice(text).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_write_preserves_the_previous_text() {
        let mut ledger = Ledger::create().unwrap();
        for text in ["one", "two", "three"] {
            ledger.write(text.as_bytes()).unwrap();
            let (_, read) = Ledger::open(ledger.read_only().unwrap()).unwrap();
            assert_eq!(read, text.as_bytes());
        }
        // "three" is in half 1: a supervisor that dies while it overwrites that half leaves "two" readable.
        ledger.file.write_all_at(b"x", HALF_BYTES + HEAD_BYTES as u64).unwrap();
        // Only root may open a read-only descriptor of the ledger for writing again.
        let (mut reopened, read) = Ledger::open(ledger.file.try_clone().unwrap().into()).unwrap();
        assert_eq!(read, b"two");
        reopened.write(b"four").unwrap();
        assert_eq!(Ledger::open(reopened.read_only().unwrap()).unwrap().1, b"four");
        assert!(Ledger::open(Ledger::create().unwrap().read_only().unwrap()).is_err(), "empty");
        assert!(ledger.write(&vec![0; HALF_BYTES as usize]).is_err());
    }

    #[test]
    fn rejects_another_protocol_version() {
        let error = parse(br#"{"control_version":1}"#).unwrap_err();
        assert!(error.to_string().contains("version 1"), "{error}");
        assert!(parse(b"{}").is_err());
    }
}
