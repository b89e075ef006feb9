//! A mount whose supervisor was killed: everything that it kept, its server has too.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use stencilfs::control::{Channel, INFLIGHT_NAME, Mount, RecordDir};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse_dev;
use stencilfs::sys::process::{has_ended, pidfd};

use super::{Found, restore};
use crate::protocol::{Numbered, ServerReply, fds, ledger, named_fds};
use crate::supervisor::Taken;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// Takes over the mount, with its server.
///
/// # Errors
/// Says what the server does not have. The mount is left as it was: it is served on.
pub fn take_over(left: &Mount) -> Result<Taken> {
    let fail = |error: Error| {
        error
            .context("cannot take over the mount, which has lost its supervisor")
            .at(&left.mountpoint)
            .remedy("it is served on; unmount it, with -l where clones use it, and mount again")
    };
    let record = RecordDir::take_over(&left.dir)?;
    from_server(left, record).map_err(fail)
}

fn from_server(left: &Mount, record: RecordDir) -> Result<Taken> {
    let pid = left.server_pid.ok_or_else(|| Error::failed("its server is gone"))?;
    let server = Holder::open(pid)?;
    let wrong = |what: &str| Error::failed(format!("its server, process {pid}, holds no {what}"));
    let fuse = server.get("fuse")?;
    if !is_of(&fuse, left.device) {
        return Err(wrong("connection of this mount"));
    }
    // What it calls so must be what its supervisor wrote down: the server may have been taken over.
    let genuine = |name: &str, known: (u64, u64)| -> Result<OwnedFd> {
        let fd = server.get(name)?;
        let its = fds::is(&fd, known);
        its.then_some(fd).ok_or_else(|| wrong(&format!("{name} that is its supervisor's")))
    };
    let [ledger, program] = left.identities;
    let program = genuine("program", program)?;
    let (ledger, snapshot) = ledger::read(genuine("ledger", ledger)?)?;
    if snapshot.device != left.device {
        return Err(wrong("ledger of this mount"));
    }
    // The descriptors are those of one process, and the ledger among them is genuine: it is that server.
    let row = snapshot.server.clone().filter(|row| row.process.pid == pid && !has_ended(&server.pidfd));
    let row = row.ok_or_else(|| wrong("ledger of its own"))?;
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

/// Tells the server that it has another supervisor: if it waits for an answer of the one before, it asks again.
pub fn greet(link: &Channel) {
    if let Err(e) = link.try_send(&Numbered { number: 0, body: ServerReply::AskAgain }, None) {
        log::warn!("the server does not hear: {e}");
    }
}

/// A server's table of requests, among its descriptors.
pub fn table_of(pid: u32) -> Option<OwnedFd> {
    Holder::open(pid).ok()?.table()
}

/// True for the connection of that device: a descriptor of another mount would be answered for in vain. Kernels that do
/// not say whose it is are believed.
pub fn is_of(fuse: &OwnedFd, device: u64) -> bool {
    fuse_dev::connection_of(fuse).is_ok_and(|its| its.is_none_or(|its| its == device))
}

/// Another process whose descriptors are copied.
pub struct Holder {
    pidfd: OwnedFd,
    pid: u32,
    /// What its arguments call them.
    names: HashMap<String, RawFd>,
}

impl Holder {
    /// That process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn open(pid: u32) -> Result<Holder> {
        let gone = || Error::failed(format!("process {pid} is gone"));
        let pidfd = pidfd(pid)?.ok_or_else(gone)?;
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| gone())?;
        let text = String::from_utf8_lossy(&arguments);
        let pairs = text.split('\0').find_map(named_fds::parse).unwrap_or_default();
        let names = pairs.into_iter().map(|(name, number)| (name.to_owned(), number)).collect();
        Ok(Holder { pidfd, pid, names })
    }

    /// A copy of what its arguments call so.
    ///
    /// # Errors
    /// When it has none.
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

    /// Copies of all whose files are wanted.
    fn files(&self, wanted: impl Fn((u64, u64)) -> bool) -> Vec<OwnedFd> {
        let identity = |path: &Path| rustix::fs::stat(path).map(|stat| (stat.st_dev, stat.st_ino));
        let matching = self.numbers().filter(|(_, path)| identity(path).is_ok_and(&wanted));
        let copies = matching.filter_map(|(number, _)| self.copy(number).ok());
        // Between the look and the copy it may have become another one.
        copies.filter(|file| fds::identity(file).is_ok_and(&wanted)).collect()
    }

    /// A copy of its table of requests.
    fn table(&self) -> Option<OwnedFd> {
        let name = format!("/memfd:{INFLIGHT_NAME} (deleted)");
        let (number, _) =
            self.numbers().find(|(_, path)| fs::read_link(path).is_ok_and(|to| to == Path::new(&name)))?;
        self.copy(number).ok()
    }
}
