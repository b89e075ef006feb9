//! Takes over a mount whose supervisor was killed: its server has all descriptors that the supervisor had.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use stencilfs::control::{Channel, INFLIGHT_NAME, Mount, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::process::{has_ended, pidfd};

use super::restore::{Found, restore};
use crate::protocol::{Numbered, ServerReply, fds, ledger, named_fds};
use crate::supervisor::Taken;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// Takes over a mount and its server.
///
/// # Errors
/// Returns an error that names the missing descriptor. The mount is left unchanged: its server still serves it.
pub fn take_over(left: &Mount) -> Result<Taken> {
    let fail = |error: Error| {
        error
            .context("cannot take over the mount, whose supervisor is dead")
            .at(&left.mountpoint)
            .remedy("the server still serves it; unmount it (with -l if clones use it) and mount again")
    };
    let record = RecordDir::take_over(&left.dir)?;
    from_server(left, record).map_err(fail)
}

fn from_server(left: &Mount, record: RecordDir) -> Result<Taken> {
    let pid = left.server_pid.ok_or_else(|| Error::failed("its server has exited"))?;
    let server = Holder::open(pid)?;
    let wrong = |what: &str| Error::failed(format!("its server, process {pid}, does not have the {what}"));
    let fuse = server.get("fuse")?;
    if !is_of(&fuse, left.device) {
        return Err(wrong("connection of this mount"));
    }
    // The server may be compromised: ledger and program must be the files that the supervisor recorded.
    let genuine = |name: &str, recorded: (u64, u64)| -> Result<OwnedFd> {
        let fd = server.get(name)?;
        let matches = fds::has_identity(&fd, recorded);
        matches.then_some(fd).ok_or_else(|| wrong(&format!("{name} of its supervisor")))
    };
    let [ledger, program] = left.identities;
    let program = genuine("program", program)?;
    let (ledger, snapshot) = ledger::read(genuine("ledger", ledger)?)?;
    if snapshot.device != left.device {
        return Err(wrong("ledger of this mount"));
    }
    // The descriptors are of one process, and its ledger is genuine: the process must be the server that the ledger
    // names.
    let row = snapshot.server.clone().filter(|row| row.process.pid == pid && !has_ended(&server.pidfd));
    let row = row.ok_or_else(|| wrong("ledger that names this process"))?;
    let found = Found {
        fuse,
        counters: server.get("counters")?,
        ledger,
        program: Program::new(program),
        listener: None,
        files: server.files(|file| snapshot.backings.iter().any(|b| b.identity == file)),
    };
    let link = Channel::new(server.get("peer")?);
    let table = server.table();
    let (begin, resources) = restore(snapshot, record, found)?;
    greet(&link);
    log::info!("took over {} with server {pid}", begin.mount.options.mountpoint.display());
    let begin = InitialState { server: Some(row), ..begin };
    Ok(Taken { begin, resources, link: Some((link, table)), drains: false })
}

/// Announces a new supervisor to the server: if the server waits for a reply, it sends its request again.
pub fn greet(link: &Channel) {
    if let Err(e) = link.try_send(&Numbered { number: 0, body: ServerReply::AskAgain }, None) {
        log::warn!("cannot announce the new supervisor to the server: {e}");
    }
}

/// Duplicates the server's descriptor of its table of pending requests.
pub fn table_of(pid: u32) -> Option<OwnedFd> {
    Holder::open(pid).ok()?.table()
}

/// Returns true if `fuse` is the connection of `device`: replies through the descriptor of another mount would be lost.
/// On kernels that do not report the device of a connection, returns true for every connection.
pub fn is_of(fuse: &OwnedFd, device: u64) -> bool {
    device::connection_of(fuse).is_ok_and(|found| found.is_none_or(|found| found == device))
}

/// Another process, whose descriptors are duplicated.
pub struct Holder {
    pidfd: OwnedFd,
    pid: u32,
    /// Descriptor numbers by name, from the arguments of the process.
    names: HashMap<String, RawFd>,
}

impl Holder {
    /// Opens a process.
    ///
    /// # Errors
    /// Returns an error if the process has exited.
    pub fn open(pid: u32) -> Result<Holder> {
        let gone = || Error::failed(format!("process {pid} has exited"));
        let pidfd = pidfd(pid)?.ok_or_else(gone)?;
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| gone())?;
        let text = String::from_utf8_lossy(&arguments);
        let pairs = text.split('\0').find_map(named_fds::parse).unwrap_or_default();
        let names = pairs.into_iter().map(|(name, number)| (name.to_owned(), number)).collect();
        Ok(Holder { pidfd, pid, names })
    }

    /// Duplicates the descriptor that has this name in the arguments of the process.
    ///
    /// # Errors
    /// Returns an error if there is no such descriptor.
    pub fn get(&self, name: &str) -> Result<OwnedFd> {
        let missing = || Error::failed(format!("process {} has no descriptor '{name}'", self.pid));
        let number = *self.names.get(name).ok_or_else(missing)?;
        self.copy(number).map_err(|e| missing().because(e))
    }

    fn copy(&self, number: RawFd) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())?)
    }

    fn numbers(&self) -> impl Iterator<Item = (RawFd, std::path::PathBuf)> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
    }

    /// Duplicates all descriptors whose files are `wanted`, by `st_dev` and `st_ino`.
    fn files(&self, wanted: impl Fn((u64, u64)) -> bool) -> Vec<OwnedFd> {
        let identity = |path: &Path| rustix::fs::stat(path).map(|stat| (stat.st_dev, stat.st_ino));
        let matching = self.numbers().filter(|(_, path)| identity(path).is_ok_and(&wanted));
        let copies = matching.filter_map(|(number, _)| self.copy(number).ok());
        // Between stat and the copy the process may have reused the number.
        copies.filter(|file| fds::identity(file).is_ok_and(&wanted)).collect()
    }

    /// Duplicates the descriptor of the table of pending requests.
    fn table(&self) -> Option<OwnedFd> {
        let name = format!("/memfd:{INFLIGHT_NAME} (deleted)");
        let (number, _) =
            self.numbers().find(|(_, path)| fs::read_link(path).is_ok_and(|to| to == Path::new(&name)))?;
        self.copy(number).ok()
    }
}
