//! Takes over a mount whose supervisor is dead, with the descriptors that its server inherited from the supervisor.

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

use super::restore::{MountFds, restore};
use crate::protocol::{Numbered, ServerReply, fds, ledger, named_fds};
use crate::supervisor::AcquiredMount;
use crate::supervisor::machine::InitialState;
use crate::supervisor::program::Program;

/// Takes over an orphaned mount and its server.
///
/// # Errors
/// Returns an error that names the missing descriptor. The mount is unchanged, and still served by its server.
pub fn take_over(orphan: &Mount) -> Result<AcquiredMount> {
    let fail = |error: Error| {
        error
            .context("cannot take over the mount, whose supervisor is dead")
            .at(&orphan.mountpoint)
            .hint(format!(
                "run 'stencil umount -l {0}', then 'stencil --store {1} mount {0}' with the options of that mount; a server \
                 that still runs serves its clones until they exit",
                orphan.mountpoint.display(),
                orphan.store.display()
            ))
    };
    let record = RecordDir::take_over(&orphan.dir)?;
    from_server(orphan, record).map_err(fail)
}

fn from_server(orphan: &Mount, record: RecordDir) -> Result<AcquiredMount> {
    let pid = orphan.server_pid.ok_or_else(|| Error::failed("the server has exited"))?;
    let server = Holder::open(pid)?;
    let wrong = |name: &str, what: &str| {
        Error::failed(format!("the descriptor of the server (process {pid}) for '{name}' is not {what}"))
    };
    let fuse = server.get("fuse")?;
    if !belongs_to(&fuse, orphan.device) {
        return Err(wrong("fuse", "the connection of this mount"));
    }
    // An attacker may control the server: the ledger and the program must be the files in the supervisor's record.
    let genuine = |name: &str, recorded: (u64, u64)| -> Result<OwnedFd> {
        let fd = server.get(name)?;
        let matches = fds::has_identity(&fd, recorded);
        matches.then_some(fd).ok_or_else(|| wrong(name, "the recorded file"))
    };
    let [ledger, program] = orphan.identities;
    let program = genuine("program", program)?;
    let (ledger, snapshot) = ledger::read(genuine("ledger", ledger)?)?;
    if snapshot.device != orphan.device {
        return Err(wrong("ledger", "the ledger of this mount"));
    }
    // All descriptors are from one process, and the ledger is genuine: that process must be the server in the ledger.
    if has_ended(&server.pidfd) {
        return Err(Error::failed(format!("the server (process {pid}) has exited")));
    }
    let row = snapshot.server.clone().filter(|row| row.process.pid == pid);
    let row = row.ok_or_else(|| wrong("ledger", "a ledger that names this process"))?;
    let found = MountFds {
        fuse,
        counters: server.get("counters")?,
        ledger,
        program: Program::new(program),
        listener: None,
        files: server.files(|file| snapshot.backings.iter().any(|b| b.identity == file)),
    };
    let link = Channel::new(server.get("peer")?);
    let table = server.in_flight_table();
    let (initial_state, resources) = restore(snapshot, record, found)?;
    announce_supervisor(&link);
    log::info!("took over {} with server {pid}", initial_state.mount.options.mountpoint.display());
    let initial_state = InitialState { server: Some(row), ..initial_state };
    Ok(AcquiredMount { initial_state, resources, link: Some((link, table)), drains: false })
}

/// Announces a new supervisor to the server. If the server waits for a reply, it sends its request again.
pub fn announce_supervisor(link: &Channel) {
    if let Err(e) = link.try_send(&Numbered { number: 0, body: ServerReply::AskAgain }, None) {
        log::warn!("cannot announce the new supervisor to the server: {e}");
    }
}

/// Duplicates a server's descriptor of its in-flight table.
pub fn in_flight_table(pid: u32) -> Option<OwnedFd> {
    Holder::open(pid).ok()?.in_flight_table()
}

/// Returns true if `fuse` is the connection of `device`: replies through the descriptor of another mount would be lost.
/// On kernels that do not report the device of a connection, always returns true.
pub fn belongs_to(fuse: &OwnedFd, device: u64) -> bool {
    device::connection_of(fuse).is_ok_and(|found| found.is_none_or(|found| found == device))
}

/// A process whose descriptors are duplicated.
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

    /// Duplicates the descriptor with this name in the arguments of the process.
    ///
    /// # Errors
    /// Returns an error if the process has no such descriptor, or the kernel does not permit duplicating it.
    pub fn get(&self, name: &str) -> Result<OwnedFd> {
        let missing = || Error::failed(format!("process {} has no descriptor '{name}'", self.pid));
        let number = *self.names.get(name).ok_or_else(missing)?;
        let failed =
            || Error::failed(format!("cannot duplicate descriptor '{name}' of process {}", self.pid));
        self.copy(number).map_err(|e| failed().because(e))
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
        // The process may have reused a number between stat(2) and pidfd_getfd(2).
        copies.filter(|file| fds::identity(file).is_ok_and(&wanted)).collect()
    }

    /// Duplicates the descriptor of the in-flight table.
    fn in_flight_table(&self) -> Option<OwnedFd> {
        let name = format!("/memfd:{INFLIGHT_NAME} (deleted)");
        let (number, _) =
            self.numbers().find(|(_, path)| fs::read_link(path).is_ok_and(|to| to == Path::new(&name)))?;
        self.copy(number).ok()
    }
}
