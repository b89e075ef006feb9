//! The mount state, which outlives servers and supervisors: descriptors, and the ledger with everything else.
//!
//! The supervisor writes the ledger after every change that a successor must see. Servers inherit all descriptors, the
//! ledger read-only, so that a new supervisor can copy them from a live server when the old supervisor is dead.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals};
use stencilfs::control::ledger::{HALF_BYTES, HEAD_BYTES, newest};
use stencilfs::control::{
    BackingRow, CONTROL_VERSION, Chosen, MountOptions, Record, RecordDir, ServerRow, Snapshot,
};
use stencilfs::error::{Error, Result};
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::{memfd, probe};
use stencilfs::units::Bytes;

use crate::control::Callers;
use crate::stats::Stats;

/// The memory file with the latest snapshot.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    sequence: u64,
}

impl Ledger {
    /// Creates an empty ledger.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create() -> io::Result<Ledger> {
        let file = memfd::create("stencil-ledger", Bytes::new(2 * HALF_BYTES))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // Mode 0400: a server has no capabilities and cannot reopen its read-only descriptor for writing.
        fchmod(&file, Mode::RUSR)?;
        Ok(Ledger { file: file.into(), sequence: 0 })
    }

    /// Opens the ledger of another supervisor. Returns its newest intact text too.
    ///
    /// # Errors
    /// Returns `InvalidData` if the file is not a ledger, or neither half is intact.
    pub fn open(file: OwnedFd) -> io::Result<(Ledger, Vec<u8>)> {
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // A server has inherited a read-only descriptor.
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap_or(file));
        let (sequence, text) = newest(&file).ok_or(io::ErrorKind::InvalidData)?;
        Ok((Ledger { file, sequence }, text))
    }

    /// Writes a new text into the older half.
    ///
    /// # Errors
    /// Returns `FileTooLarge` if the text exceeds a half.
    pub fn write(&mut self, text: &[u8]) -> io::Result<()> {
        if (HEAD_BYTES + text.len()) as u64 > HALF_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.sequence += 1;
        let mut record = Vec::with_capacity(HEAD_BYTES + text.len());
        record.extend(self.sequence.to_le_bytes());
        record.extend((text.len() as u64).to_le_bytes());
        record.extend(blake3::hash(text).as_bytes());
        record.extend(text);
        self.file.write_all_at(&record, self.sequence % 2 * HALF_BYTES)
    }

    /// Opens the ledger read-only.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The program that servers are started from, as an open file: a later replacement on disk has no effect.
#[derive(Debug)]
pub struct Program {
    /// The open executable.
    pub file: OwnedFd,
    /// Its path when it was opened.
    pub name: PathBuf,
}

impl Program {
    /// Wraps the descriptor of an executable.
    pub fn new(file: OwnedFd) -> Program {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = std::fs::read_link(link).unwrap_or_default();
        Program { file, name }
    }

    /// Opens the executable of this process.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn own() -> io::Result<Program> {
        Ok(Program::new(File::open("/proc/self/exe")?.into()))
    }
}

/// The mount state that a supervisor holds.
#[derive(Debug)]
pub struct MountState {
    /// Options of the mount, with canonical paths.
    pub options: MountOptions,
    /// Identity of the store, to recognize it under another path.
    pub store_id: Option<String>,
    /// `st_dev` of the mount's files.
    pub device: u64,
    /// The kernel's INIT request.
    pub init: Vec<u8>,
    /// The reply to INIT that was sent.
    pub reply: Option<Vec<u8>>,
    /// Location and limit of the backings.
    pub chosen: Chosen,
    /// Number of servers that were started to replace another server.
    pub restarts: u64,
    /// 1 after a termination signal; kept when the supervisor executes another program.
    pub terminations: u32,
    /// The FUSE connection.
    pub fuse: OwnedFd,
    /// The counters.
    pub stats: Stats,
    /// The record and its lock.
    pub record: RecordDir,
    /// The listening control socket.
    pub listener: OwnedFd,
    /// The program that servers are started from.
    pub program: Program,
    /// The program before a restart, until a server of the new one has proved itself.
    pub previous: Option<Program>,
    /// The ledger.
    pub ledger: Ledger,
}

impl MountState {
    /// Returns the state without descriptors.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be read.
    pub fn snapshot(
        &self,
        server: Option<ServerRow>,
        leaving: Vec<ProcessId>,
        backings: Vec<BackingRow>,
    ) -> Result<Snapshot> {
        Ok(Snapshot {
            control_version: CONTROL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            options: self.options.clone(),
            device: self.device,
            record: self.record.path().to_owned(),
            supervisor: ProcessId::me()?,
            init: self.init.clone(),
            reply: self.reply.clone(),
            chosen: self.chosen.clone(),
            server,
            leaving,
            page: Some(identity(self.stats.page().fd())?),
            terminations: self.terminations,
            restarts: self.restarts,
            last_end: None,
            early_ends: 0,
            next_start: None,
            backings,
            store_id: self.store_id.clone(),
            condemned: Vec::new(),
            counters: self.stats.all(),
        })
    }
}

impl MountState {
    /// Returns the descriptors that only the supervisor may hold, as a child must not hold them after the supervisor's
    /// death: the connection, the record with its lock, the listener and the callers' connections.
    pub fn private_fds<'a>(&'a self, callers: &'a Callers) -> Vec<BorrowedFd<'a>> {
        let own = [self.fuse.as_fd(), self.record.folder(), self.listener.as_fd()];
        own.into_iter().chain(callers.channels().map(|(_, channel)| channel)).collect()
    }

    /// Writes the record, by which other programs find the mount.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written.
    pub fn write_record(&self, server: Option<ProcessId>) -> Result<()> {
        let me = ProcessId::me()?;
        self.record.write(&Record {
            mountpoint: self.options.mountpoint.clone(),
            store: self.options.store.clone(),
            store_id: self.store_id.clone(),
            device: self.device,
            supervisor_pid: me.pid,
            supervisor_identity: me.identity,
            server_pid: server.map(|s| s.pid),
            server_identity: server.map_or(0, |s| s.identity),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ledger: identity(&self.ledger)?,
            program: identity(&self.program.file)?,
            pid_namespace: probe::pid_namespace(),
        })
    }
}

/// Returns `st_dev` and `st_ino` of an open file.
///
/// # Errors
/// Returns an error if fstat(2) fails.
pub fn identity(file: impl AsFd) -> Result<(u64, u64)> {
    let stat = rustix::fs::fstat(file)
        .map_err(|e| Error::failed("cannot inspect a descriptor").because(e.into()))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Returns true if `file` has the identity `expected`.
pub fn has_identity(file: impl AsFd, expected: (u64, u64)) -> bool {
    identity(file).is_ok_and(|found| found == expected)
}

/// Duplicates a descriptor.
///
/// # Errors
/// Returns an error if the process has no free descriptor.
pub fn duplicate(file: impl AsFd) -> Result<OwnedFd> {
    file.as_fd().try_clone_to_owned().map_err(|e| {
        Error::failed("cannot duplicate a descriptor")
            .because(e)
            .remedy("raise the limit on open files: ulimit -n")
    })
}

/// Opens the ledger of another supervisor, and parses its contents.
///
/// # Errors
/// Returns an error if the file is not a ledger, or is of another version.
pub fn read(file: OwnedFd) -> Result<(Ledger, Snapshot)> {
    let (ledger, text) =
        Ledger::open(file).map_err(|e| Error::failed("cannot read the ledger").because(e))?;
    Ok((ledger, parse(&text)?))
}

/// Reads the ledger again. Makes no system calls that a sandboxed server may not make.
///
/// # Errors
/// Returns an error if no intact half can be read.
pub fn read_snapshot(file: &OwnedFd) -> Result<Snapshot> {
    let unreadable = |e: io::Error| Error::failed("cannot read the ledger").because(e);
    let file = File::from(duplicate(file)?);
    // A writer changes one half at a time: both appear torn only if two writes happen during one read.
    for _ in 0..1000 {
        if let Some((_, text)) = newest(&file) {
            return parse(&text);
        }
    }
    Err(unreadable(io::ErrorKind::InvalidData.into()))
}

/// Parses a snapshot of this version.
///
/// # Errors
/// Returns an error that names both versions if they differ.
fn parse(text: &[u8]) -> Result<Snapshot> {
    #[derive(serde::Deserialize)]
    struct Version {
        control_version: u32,
    }
    let remedy = "keep the old program, or unmount and mount again with the new program";
    let version: Version = serde_json::from_slice(text).map_err(|e| {
        Error::failed(format!("cannot parse the previous supervisor's state: {e}")).remedy(remedy)
    })?;
    if version.control_version != CONTROL_VERSION {
        return Err(Error::failed(format!(
            "the mount uses protocol version {} between its processes, this program uses {CONTROL_VERSION}",
            version.control_version
        ))
        .remedy(remedy));
    }
    serde_json::from_slice(text).map_err(|e| {
        Error::failed(format!("cannot parse the previous supervisor's state: {e}")).remedy(remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_write_leaves_the_previous_text() {
        let mut ledger = Ledger::create().unwrap();
        for text in ["one", "two", "three"] {
            ledger.write(text.as_bytes()).unwrap();
            let (_, read) = Ledger::open(ledger.read_only().unwrap()).unwrap();
            assert_eq!(read, text.as_bytes());
        }
        // "three" is in half 1: a supervisor that dies during that write leaves "two".
        ledger.file.write_all_at(b"x", HALF_BYTES + HEAD_BYTES as u64).unwrap();
        let (mut again, read) = Ledger::open(ledger.read_only().unwrap()).unwrap();
        assert_eq!(read, b"two");
        again.write(b"four").unwrap();
        assert_eq!(Ledger::open(again.read_only().unwrap()).unwrap().1, b"four");
        assert!(Ledger::open(Ledger::create().unwrap().read_only().unwrap()).is_err(), "an empty ledger");
        assert!(ledger.write(&vec![0; HALF_BYTES as usize]).is_err());
    }

    #[test]
    fn rejects_another_version_by_name() {
        let error = parse(br#"{"control_version":1}"#).unwrap_err();
        assert!(error.to_string().contains("version 1"), "{error}");
        assert!(parse(b"{}").is_err());
    }
}
