//! The record of one clone: who it is, what it has, and how all of that goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{CLONES, RECORD, is_held};
use crate::clones::baseline::Baseline;
use crate::clones::{family, ports};
use crate::control::runtime::{self, is_pid, is_plain_name, is_whole_path, trusted_folder};
use crate::error::{Error, Result};
use crate::store::Digest;
use crate::sys::folder::Folder;
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// File in a clone's folder: what its process has written.
pub const LOG: &str = "log";
/// File in a clone's folder: what its guest has written to the first serial port.
pub const SERIAL_LOG: &str = "serial.log";

/// No more of a log is read into memory.
const MAX_LOG: Bytes = Bytes::new(256 << 20);

/// What kind of process a clone is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One of our own workers that maps the template and touches pages of it.
    Simulated,
    /// A QEMU that was resumed by the template's recipe.
    Qemu,
    /// Any command of the user's.
    Command,
}

impl Kind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Simulated => "simulated",
            Kind::Qemu => "qemu",
            Kind::Command => "command",
        }
    }
}

/// Pages that a simulated clone was told to touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Pages read and not written.
    pub read_pages: u64,
    /// Pages written.
    pub written_pages: u64,
}

/// The store of a clone's template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreOfClone {
    /// Where it was when the clone was launched (canonical).
    pub path: PathBuf,
    /// Its [`id`](crate::store::Store::id).
    pub id: String,
}

/// One clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Short and unique in this runtime directory; begins with a letter, so it is never taken for a pid.
    pub id: String,
    /// Its process; 0 while there is none.
    pub pid: u32,
    /// That process's identity.
    pub identity: u64,
    /// The template as it was asked for.
    pub name: String,
    /// The template's digest.
    pub template: String,
    /// The template's store; unknown to versions before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreOfClone>,
    /// What kind of process it is.
    pub kind: Kind,
    /// Its own folder.
    pub dir: PathBuf,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Its number within its launch, from 0.
    pub index: u32,
    /// The launch that it belongs to.
    pub launch: String,
    /// The host's free memory before its launch, if no clone lived then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
    /// What a simulated clone was told to touch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub touched: Option<Touched>,
    /// Its ports of the host: the N of `{port:N}`, and which it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// The machine's UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Names of its disks. Noted before any of them is made, so that none outlives the record.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub disks: BTreeSet<String>,
    /// Where they are, unless it is its own folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_dir: Option<PathBuf>,
    /// The PID namespace that its process's number is of; unknown to versions before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_namespace: Option<u64>,
    /// The process that notes how this clone ends, and ends after the last clone of the launch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<ProcessId>,
}

impl Entry {
    /// Its process, once it has one whose number means something in this PID namespace.
    pub fn process(&self) -> Option<ProcessId> {
        let known = self.pid != 0 && !self.is_foreign();
        known.then_some(ProcessId { pid: self.pid, identity: self.identity })
    }

    /// True for a clone of another PID namespace: whether it lives cannot be known here.
    pub fn is_foreign(&self) -> bool {
        self.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace())
    }

    /// Fails for a clone of another PID namespace.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) that says where it can be ended.
    pub fn expect_ours(&self) -> Result<()> {
        if !self.is_foreign() {
            return Ok(());
        }
        let what = format!("clone {} is of another PID namespace: whether it lives cannot be seen", self.id);
        let elsewhere = self.disks.iter().filter(|_| self.disk_dir.is_some());
        let disks: String =
            elsewhere.map(|name| format!(" and {}", self.disk_path(name).display())).collect();
        Err(Error::try_again(what).at(&self.dir).remedy(format!(
            "run `stencil stop {}` where it was launched; if nobody lives there any more, remove this folder{disks}",
            self.id
        )))
    }

    /// True while its launcher still holds it.
    pub fn is_launching(&self) -> bool {
        is_held(&self.launch)
    }

    /// True while its process lives.
    pub fn is_alive(&self) -> bool {
        self.process().is_some_and(|process| process.is_alive())
    }

    /// Where it writes what it has to say.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join(LOG)
    }

    /// The QMP socket of a QEMU clone.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// Where its disk of that name is. In a folder that others use, the name is nobody else's: the launch's is random too.
    pub fn disk_path(&self, name: &str) -> PathBuf {
        let Some(dir) = &self.disk_dir else { return self.dir.join(format!("disk-{name}.qcow2")) };
        let launch = self.launch.split('.').next().unwrap_or_default();
        dir.join(format!("stencil-{}-{launch}-{name}.qcow2", self.id))
    }

    /// Notes its process.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn set_process(&mut self, process: ProcessId) -> Result<()> {
        (self.pid, self.identity) = (process.pid, process.identity);
        self.save()
    }

    /// Writes the record: readers see the old one or the new one.
    ///
    /// # Errors
    /// When it cannot be written, or nobody could read it again.
    pub fn save(&self) -> Result<()> {
        if let Some(field) = self.problem_of_fields() {
            return Err(Error::usage(format!("the {field} of a clone is invalid")).at(&self.dir).remedy(
                "names have letters, digits, '.', '_' and '-' only: see `stencil inspect --recipe`",
            ));
        }
        let write = |folder: &Folder| runtime::replace(folder, RECORD, &serde_json::to_vec(self)?);
        let name = self.dir.file_name().unwrap_or_default();
        let written = match runtime::open(CLONES)? {
            Some(all) => trusted_folder(&all, name).and_then(|folder| write(&folder)),
            None => Err(ErrorKind::NotFound.into()),
        };
        written.map_err(|e| runtime::failed("cannot write the record of a clone", &self.dir.join(RECORD), e))
    }

    /// The first field that no launch writes so: numbers and names in a record decide what is signalled and removed.
    pub(super) fn problem(&self) -> Option<&'static str> {
        let is_named_so = self.dir.file_name().is_some_and(|name| name == self.id.as_str());
        if is_named_so { self.problem_of_fields() } else { Some("id") }
    }

    fn problem_of_fields(&self) -> Option<&'static str> {
        let is_uuid = |text: &String| text.len() == 36 && is_plain_name(text);
        let fields = [
            ("id", is_plain_name(&self.id)),
            ("pid", self.pid == 0 || is_pid(self.pid)),
            ("name", self.name.len() <= 1024),
            ("template", self.template.parse::<Digest>().is_ok()),
            ("launch", is_plain_name(&self.launch)),
            ("ports", self.ports.iter().all(|(name, port)| name.len() <= 255 && *port != 0)),
            ("uuid", self.uuid.as_ref().is_none_or(is_uuid)),
            ("disks", self.disks.iter().all(|name| is_plain_name(name))),
            ("disk_dir", self.disk_dir.as_deref().is_none_or(is_whole_path)),
        ];
        fields.into_iter().find(|(_, is_valid)| !is_valid).map(|(field, _)| field)
    }

    /// Opens its log to write at its end.
    ///
    /// # Errors
    /// When it cannot be opened, or something else is there.
    pub fn open_log(&self) -> Result<fs::File> {
        open_log(&self.dir)
    }

    /// The contents of its log, or of another file that it writes; none where there is no such file.
    ///
    /// # Errors
    /// When it cannot be read, or is no regular file.
    pub fn read_file(&self, name: &str) -> std::io::Result<Option<Vec<u8>>> {
        let read = Folder::open(&self.dir).and_then(|folder| folder.read(name, MAX_LOG));
        match read {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Removes its disks and its folder, and gives its ports back. What is gone already is fine.
    ///
    /// # Errors
    /// When something cannot be removed, or it may live in another PID namespace.
    pub fn remove(&self) -> Result<()> {
        self.expect_ours()?;
        // The record goes last: it alone knows of the others.
        for path in self.disks.iter().map(|name| self.disk_path(name)) {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("cannot remove the disk of a clone", &path, e));
                }
                _ => {}
            }
        }
        ports::give_back(self);
        remove_folder(&self.dir)
    }

    /// Kills its processes and removes its folder.
    ///
    /// # Errors
    /// When a process cannot be killed, or the folder not removed.
    pub fn destroy(&self) -> Result<()> {
        family::kill(std::slice::from_ref(self))?;
        self.remove()
    }
}

/// Opens the log in a clone's folder to write at its end.
///
/// # Errors
/// When it cannot be opened, or something else is there.
pub fn open_log(dir: &Path) -> Result<fs::File> {
    let opened = Folder::open(dir).and_then(|folder| runtime::append(&folder, LOG));
    opened.map_err(|e| runtime::failed("cannot write the log of a clone", &dir.join(LOG), e))
}

pub(super) fn remove_folder(path: &Path) -> Result<()> {
    // A worker that dies just now may still have put its log there.
    for _ in 0..50 {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(10))
            }
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the folder of a clone", path, e));
            }
            _ => return Ok(()),
        }
    }
    Err(Error::failed("the folder of a clone is still being written to").at(path))
}
