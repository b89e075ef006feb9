//! The record of one clone: its process, its resources, and their removal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ending::Ending;
use super::layout::{CLONES, RECORD, is_held};
use crate::clones::baseline::Baseline;
use crate::control::runtime::{self, is_pid, is_plain_name, is_whole_path, trusted_folder};
use crate::error::{Error, Result};
use crate::store::Digest;
use crate::sys::files::directory::Directory;
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// File in a clone's directory with the output of its process.
pub const LOG: &str = "log";
/// File in a Firecracker clone's directory with the messages of Firecracker.
pub const VMM_LOG: &str = "vmm.log";
/// File in a clone's directory with the output of its guest's first serial port.
pub const SERIAL_LOG: &str = "serial.log";
/// FIFO in a Firecracker clone's directory: the input of its guest's serial port.
pub const SERIAL_INPUT: &str = "serial.in";
/// Socket in a QEMU clone's directory: QMP.
pub const QMP_SOCKET: &str = "qmp.sock";
/// Socket in the directory of a Firecracker or Cloud Hypervisor clone, or a link to the socket in the clone's jail: the
/// VMM's API.
pub const API_SOCKET: &str = "api.sock";

/// Maximum size of all labels of a clone. Its record is at most 1 MiB.
const MAX_LABELS: usize = 64 << 10;

/// Maximum size of a log that is read into memory.
const MAX_LOG: Bytes = Bytes::new(256 << 20);

/// The kind of process that a clone is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A worker of Stencil that maps the template and touches its pages.
    Simulated,
    /// A QEMU that was resumed by the template's recipe.
    Qemu,
    /// A Firecracker that loaded the template's snapshot.
    Firecracker,
    /// A Cloud Hypervisor that restored the template's snapshot.
    CloudHypervisor,
    /// A command that the user gave.
    Command,
}

impl Kind {
    /// Returns the name of the kind.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Simulated => "simulated",
            Kind::Qemu => "qemu",
            Kind::Firecracker => "firecracker",
            Kind::CloudHypervisor => "cloud-hypervisor",
            Kind::Command => "command",
        }
    }
}

/// Number of pages that a simulated clone was to touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Pages read and not written.
    pub read_pages: u64,
    /// Pages written.
    pub written_pages: u64,
}

/// The store of a clone's template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneStore {
    /// Canonical path of the store at the time of the launch.
    pub path: PathBuf,
    /// [`id`](crate::store::Store::id) of the store.
    pub id: String,
}

/// The record of one clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Short id, unique in this runtime directory. The first character is a letter, so an id is never taken for a pid.
    pub id: String,
    /// Process id; 0 while the clone has no process.
    pub pid: u32,
    /// Identity of the process, which distinguishes it from other processes with the same id.
    pub identity: u64,
    /// Template reference given at launch.
    #[serde(rename = "reference")]
    pub name: String,
    /// Digest of the template.
    #[serde(rename = "digest")]
    pub template: String,
    /// Store of the template.
    pub store: CloneStore,
    /// Kind of process.
    pub kind: Kind,
    /// Directory of the clone.
    pub dir: PathBuf,
    /// Time of creation, in seconds since 1970.
    pub created: u64,
    /// Number of the clone within its launch, from 0.
    pub index: u32,
    /// Id of the launch.
    pub launch: String,
    /// Free memory of the host before the launch, if no clone was alive then.
    pub baseline: Option<Baseline>,
    /// Pages that a simulated clone was to touch.
    pub touched: Option<Touched>,
    /// Labels given at launch.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Ports of the host, by the N of `{port:N}`.
    pub ports: BTreeMap<String, u16>,
    /// UUID of the virtual machine.
    pub uuid: Option<String>,
    /// Names of the disks. A name is recorded before its disk is made, so that no disk outlives the record.
    pub disks: BTreeSet<String>,
    /// Directory of the disks, if it is not the clone's directory.
    pub disk_dir: Option<PathBuf>,
    /// Directory that Firecracker's jailer has made for the clone.
    pub jail: Option<PathBuf>,
    /// Size of the program that the jailer has copied into the jail, if the jail is in a file system without other
    /// storage.
    pub jail_bytes: Bytes,
    /// PID namespace of the process id, if `/proc` shows it.
    pub pid_namespace: Option<u64>,
    /// Process that writes the exit record of the clone. It exits after the last clone of the launch.
    pub watchdog: Option<ProcessId>,
    /// How the process of a simulated clone ended; every other clone has a separate exit record.
    #[serde(skip)]
    pub ending: Option<Ending>,
}

impl Entry {
    /// Returns the clone's process, if the clone has one in this PID namespace.
    pub fn process(&self) -> Option<ProcessId> {
        let is_valid = self.pid != 0 && !self.is_foreign();
        is_valid.then_some(ProcessId { pid: self.pid, identity: self.identity })
    }

    /// Returns true for a clone of another PID namespace, whose process cannot be identified here.
    pub fn is_foreign(&self) -> bool {
        self.pid_namespace.is_some_and(|its| Some(its) != probe::pid_namespace())
    }

    /// Checks that the clone is of this PID namespace.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) for a clone of another PID namespace.
    pub fn expect_ours(&self) -> Result<()> {
        if !self.is_foreign() {
            return Ok(());
        }
        let what =
            format!("clone {} is of another PID namespace: its process cannot be checked here", self.id);
        let elsewhere = self.disks.iter().filter(|_| self.disk_dir.is_some());
        let elsewhere = elsewhere.map(|name| self.disk_path(name)).chain(self.jail.clone());
        let elsewhere: String = elsewhere.map(|path| format!(" and {}", path.display())).collect();
        Err(Error::try_again(what).at(&self.dir).hint(format!(
            "run 'stencil stop {}' in its PID namespace; if that namespace has ended, remove this directory{elsewhere}",
            self.id
        )))
    }

    /// Returns true while the launcher has not released the clone.
    pub fn is_launching(&self) -> bool {
        is_held(&self.launch)
    }

    /// Returns true while the clone's process is alive.
    pub fn is_alive(&self) -> bool {
        self.process().is_some_and(|process| process.is_alive())
    }

    /// Returns the path of the log of a clone that is not simulated.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join(LOG)
    }

    /// Returns the path of the QMP socket of a QEMU clone.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.join(QMP_SOCKET)
    }

    /// Returns the path of the disk with this name. In a shared directory, the random launch id keeps the path unique.
    pub fn disk_path(&self, name: &str) -> PathBuf {
        let Some(dir) = &self.disk_dir else { return self.dir.join(format!("disk-{name}.qcow2")) };
        let launch = self.launch.split('.').next().unwrap_or_default();
        dir.join(format!("stencil-{}-{launch}-{name}.qcow2", self.id))
    }

    /// Records the clone's process.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written.
    pub fn set_process(&mut self, process: ProcessId) -> Result<()> {
        (self.pid, self.identity) = (process.pid, process.identity);
        self.save()
    }

    /// Writes the record atomically: a reader gets either the old or the new record.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written or has an invalid field, so that it could not be read again.
    pub fn save(&self) -> Result<()> {
        let all = runtime::open(CLONES)?.ok_or(ErrorKind::NotFound.into());
        let directory = all.and_then(|all| trusted_folder(&all, self.dir.file_name().unwrap_or_default()));
        self.save_in(&directory.map_err(|e| self.not_written(e))?)
    }

    /// Same as [`save`](Self::save), in the open directory of the clone.
    pub(super) fn save_in(&self, directory: &Directory) -> Result<()> {
        if let Some(field) = self.problem_of_fields() {
            return Err(Error::usage(format!("invalid {field} of a clone")).at(&self.dir).hint(match field {
                "labels" => "use shorter labels: at most 64 KiB in all",
                _ => "use only letters, digits, '.', '_' and '-' in the names of disks: see 'stencil inspect --recipe'",
            }));
        }
        let text = serde_json::to_vec(self).map_err(std::io::Error::from);
        text.and_then(|text| runtime::replace(directory, RECORD, &text)).map_err(|e| self.not_written(e))
    }

    fn not_written(&self, e: std::io::Error) -> Error {
        runtime::failed("cannot write the record of a clone", &self.dir.join(RECORD), e)
    }

    /// Returns the name of an invalid field. Numbers and names of a record select the processes that are signalled and
    /// the files that are removed, so every record is checked.
    pub(super) fn problem(&self) -> Option<&'static str> {
        let is_named_so = self.dir.file_name().is_some_and(|name| name == self.id.as_str());
        if is_named_so { self.problem_of_fields() } else { Some("id") }
    }

    fn problem_of_fields(&self) -> Option<&'static str> {
        let is_uuid = |text: &String| text.len() == 36 && is_plain_name(text);
        let fields = [
            ("id", is_plain_name(&self.id)),
            ("pid", self.pid == 0 || is_pid(self.pid)),
            ("reference", self.name.len() <= 1024),
            ("digest", self.template.parse::<Digest>().is_ok()),
            ("launch", is_plain_name(&self.launch)),
            (
                "labels",
                self.labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() <= MAX_LABELS,
            ),
            ("ports", self.ports.iter().all(|(name, port)| name.len() <= 255 && *port != 0)),
            ("uuid", self.uuid.as_ref().is_none_or(is_uuid)),
            ("disks", self.disks.iter().all(|name| is_plain_name(name))),
            ("disk_dir", self.disk_dir.as_deref().is_none_or(is_whole_path)),
            ("jail", self.jail.as_deref().is_none_or(|jail| is_whole_path(jail) && jail.ends_with(&self.id))),
        ];
        fields.into_iter().find(|(_, is_valid)| !is_valid).map(|(field, _)| field)
    }

    /// Opens a log for appending: [`LOG`], [`VMM_LOG`] or [`SERIAL_LOG`].
    ///
    /// # Errors
    /// Returns an error if the log cannot be opened or is not a regular file.
    pub fn open_log(&self, name: &str) -> Result<fs::File> {
        let opened = Directory::open(&self.dir).and_then(|directory| runtime::append(&directory, name));
        opened.map_err(|e| runtime::failed("cannot write the log of a clone", &self.dir.join(name), e))
    }

    /// Reads the log or another file in the clone's directory. Returns `None` if the file does not exist.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or is not a regular file.
    pub fn read_file(&self, name: &str) -> std::io::Result<Option<Vec<u8>>> {
        if_any(Directory::open(&self.dir).and_then(|directory| directory.read(name, MAX_LOG)))
    }

    /// Opens a file in the clone's directory for reading. Returns `None` if the file does not exist.
    ///
    /// # Errors
    /// Returns an error if the file cannot be opened or is not a regular file.
    pub fn open_file(&self, name: &str) -> std::io::Result<Option<fs::File>> {
        if_any(Directory::open(&self.dir).and_then(|directory| directory.file(name)))
    }
}

fn if_any<T>(found: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
