//! What outlives a server, and a supervisor: the descriptors, and the ledger with everything that is no descriptor.
//!
//! The supervisor writes the ledger anew after every change that a successor must know. Servers inherit it read-only,
//! with every other descriptor, so that a new supervisor finds all of it in a living server when the old one is dead.

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

/// A memory file with the newest snapshot.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    turn: u64,
}

impl Ledger {
    /// An empty one.
    ///
    /// # Errors
    /// The system's.
    pub fn create() -> io::Result<Ledger> {
        let file = memfd::create("stencil-ledger", Bytes::new(2 * HALF_BYTES))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // A server has no capabilities: it cannot open its read-only copy for writing.
        fchmod(&file, Mode::RUSR)?;
        Ok(Ledger { file: file.into(), turn: 0 })
    }

    /// One that another supervisor wrote, and its text.
    ///
    /// # Errors
    /// `InvalidData` when it is no ledger, or holds nothing whole.
    pub fn open(file: OwnedFd) -> io::Result<(Ledger, Vec<u8>)> {
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // What a server inherited is open for reading only.
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap_or(file));
        let (turn, text) = newest(&file).ok_or(io::ErrorKind::InvalidData)?;
        Ok((Ledger { file, turn }, text))
    }

    /// Writes the newest text.
    ///
    /// # Errors
    /// `FileTooLarge` for more than a half holds.
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

    /// The same for reading only.
    ///
    /// # Errors
    /// The system's.
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

/// A program that servers are started from: what is replaced on disk later changes nothing.
#[derive(Debug)]
pub struct Program {
    /// The open binary.
    pub file: OwnedFd,
    /// Its name at that time.
    pub name: PathBuf,
}

impl Program {
    /// The program behind a descriptor.
    pub fn new(file: OwnedFd) -> Program {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = std::fs::read_link(link).unwrap_or_default();
        Program { file, name }
    }

    /// This one.
    ///
    /// # Errors
    /// The system's.
    pub fn own() -> io::Result<Program> {
        Ok(Program::new(File::open("/proc/self/exe")?.into()))
    }
}

/// What a supervisor keeps.
#[derive(Debug)]
pub struct Kept {
    /// How the mount was asked for, with canonical paths.
    pub options: MountOptions,
    /// Identity of the store, for those who know it by another path.
    pub store_id: Option<String>,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// The kernel's INIT request.
    pub init: Vec<u8>,
    /// The reply that the kernel has.
    pub reply: Option<Vec<u8>>,
    /// Where backings are.
    pub chosen: Chosen,
    /// Servers that were started in place of others.
    pub restarts: u64,
    /// More than 0 once a signal has asked for the end; also after the supervisor has become another program.
    pub terminations: u32,
    /// The connection.
    pub fuse: OwnedFd,
    /// The counters.
    pub stats: Stats,
    /// The record and its lock.
    pub record: RecordDir,
    /// The control socket.
    pub listener: OwnedFd,
    /// What servers are started from.
    pub program: Program,
    /// What they were started from before a restart, while the new one has not proved itself.
    pub previous: Option<Program>,
    /// The ledger.
    pub ledger: Ledger,
}

impl Kept {
    /// Everything that is no descriptor.
    ///
    /// # Errors
    /// When this process is not in `/proc`.
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

impl Kept {
    /// What no child may have while the supervisor is dead: the connection, the record and its lock, and who calls.
    pub fn alone<'a>(&'a self, callers: &'a Callers) -> Vec<BorrowedFd<'a>> {
        let own = [self.fuse.as_fd(), self.record.folder(), self.listener.as_fd()];
        own.into_iter().chain(callers.channels().map(|(_, channel)| channel)).collect()
    }

    /// Lets other programs find the mount.
    ///
    /// # Errors
    /// The filesystem's.
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

/// `st_dev` and `st_ino` of an open file.
///
/// # Errors
/// The system's.
pub fn identity(file: impl AsFd) -> Result<(u64, u64)> {
    let stat =
        rustix::fs::fstat(file).map_err(|e| Error::failed("a descriptor is lost").because(e.into()))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// True when that is the identity of an open file.
pub fn is(file: impl AsFd, known: (u64, u64)) -> bool {
    identity(file).is_ok_and(|its| its == known)
}

/// Another descriptor of the same file.
///
/// # Errors
/// When the process is out of descriptors.
pub fn copy(file: impl AsFd) -> Result<OwnedFd> {
    file.as_fd().try_clone_to_owned().map_err(|e| {
        Error::failed("out of descriptors").because(e).remedy("raise the limit of open files: ulimit -n")
    })
}

/// A ledger that another supervisor wrote, and what is in it.
///
/// # Errors
/// When it is none, or of another version.
pub fn read(file: OwnedFd) -> Result<(Ledger, Snapshot)> {
    let (ledger, text) =
        Ledger::open(file).map_err(|e| Error::failed("the ledger cannot be read").because(e))?;
    Ok((ledger, parse(&text)?))
}

/// What is in the ledger now. Makes no system call but reads: a server in its sandbox can do it.
///
/// # Errors
/// When nothing whole is in it.
pub fn look(file: &OwnedFd) -> Result<Snapshot> {
    let unreadable = |e: io::Error| Error::failed("the ledger cannot be read").because(e);
    let file = File::from(copy(file)?);
    // Who writes the one half leaves the other: both are torn only if two were written while this one was read.
    for _ in 0..1000 {
        if let Some((_, text)) = newest(&file) {
            return parse(&text);
        }
    }
    Err(unreadable(io::ErrorKind::InvalidData.into()))
}

/// Reads a snapshot; one of another version is refused.
///
/// # Errors
/// Says which versions meet.
fn parse(text: &[u8]) -> Result<Snapshot> {
    #[derive(serde::Deserialize)]
    struct Version {
        control_version: u32,
    }
    let remedy = "keep the old program, or unmount and mount again with the new one";
    let version: Version = serde_json::from_slice(text).map_err(|e| {
        Error::failed(format!("what the other supervisor knew is not understood: {e}")).remedy(remedy)
    })?;
    if version.control_version != CONTROL_VERSION {
        return Err(Error::failed(format!(
            "the mount speaks version {} between its processes, this program {CONTROL_VERSION}",
            version.control_version
        ))
        .remedy(remedy));
    }
    serde_json::from_slice(text).map_err(|e| {
        Error::failed(format!("what the other supervisor knew is not understood: {e}")).remedy(remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_that_was_torn_gives_the_text_before() {
        let mut ledger = Ledger::create().unwrap();
        for text in ["one", "two", "three"] {
            ledger.write(text.as_bytes()).unwrap();
            let (_, read) = Ledger::open(ledger.read_only().unwrap()).unwrap();
            assert_eq!(read, text.as_bytes());
        }
        // "three" is in half 1: a supervisor that dies while it writes it leaves "two".
        ledger.file.write_all_at(b"x", HALF_BYTES + HEAD_BYTES as u64).unwrap();
        let (mut again, read) = Ledger::open(ledger.read_only().unwrap()).unwrap();
        assert_eq!(read, b"two");
        again.write(b"four").unwrap();
        assert_eq!(Ledger::open(again.read_only().unwrap()).unwrap().1, b"four");
        assert!(Ledger::open(Ledger::create().unwrap().read_only().unwrap()).is_err(), "an empty one");
        assert!(ledger.write(&vec![0; HALF_BYTES as usize]).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let error = parse(br#"{"control_version":1}"#).unwrap_err();
        assert!(error.to_string().contains("version 1"), "{error}");
        assert!(parse(b"{}").is_err());
    }
}
