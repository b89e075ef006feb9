//! The record of the epochs of one process, in the runtime directory: `epochs/PID-IDENTITY[-NAMESPACE]/epochs.json`.

use std::io::{self, ErrorKind};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::pages::PageSet;
use crate::control::runtime::{self, is_plain_name, trusted_folder};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// Directory in the runtime directory.
const EPOCHS: &str = "epochs";

/// File with the epochs of a process.
const FILE: &str = "epochs.json";

/// Largest record: some millions of ranges.
const MAX_RECORD: Bytes = Bytes::new(64 << 20);

/// Time limit for another command that marks an epoch of the same process.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// One epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Name, unique among the epochs of the process.
    pub name: String,
    /// Seconds since 1970 at the mark.
    pub at: u64,
    /// True if the mark has write-protected the copied pages.
    pub tracked: bool,
    /// Dirty pages at the mark.
    pub copied: PageSet,
    /// Pages that were written between the mark before and this one, if both were tracked.
    pub written: PageSet,
}

/// The locked record of one process.
#[derive(Debug)]
pub struct Record {
    all: Directory,
    folder: Directory,
    name: String,
}

impl Record {
    /// Opens and locks the record of a process. Returns `None` if it has none.
    ///
    /// # Errors
    /// Returns an error if another user can write to the record, or if the record cannot be opened or locked.
    pub fn open(process: ProcessId) -> Result<Option<Record>> {
        let Some(all) = runtime::open(EPOCHS)? else { return Ok(None) };
        let name = name_of(process);
        match trusted_folder(&all, &name) {
            Ok(folder) => Record { all, folder, name }.locked().map(Some),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(runtime::failed("cannot open the epochs of a process", &all.path_of(&name), e)),
        }
    }

    /// Same as [`Record::open`], but creates a missing record.
    ///
    /// # Errors
    /// Same as [`Record::open`], and an error if the runtime directory cannot be written.
    pub fn create(process: ProcessId) -> Result<Record> {
        let all = runtime::create(EPOCHS)?;
        let name = name_of(process);
        let folder = match all.create_folder(&name, 0o700) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => trusted_folder(&all, &name),
            created => created,
        };
        let failed = |e| runtime::failed("cannot open the epochs of a process", &all.path_of(&name), e);
        Record { folder: folder.map_err(failed)?, all, name }.locked()
    }

    fn locked(self) -> Result<Record> {
        match file_locks::wait(&self.folder, true, LOCK_TIMEOUT, || false) {
            Ok(true) => Ok(self),
            Ok(false) => Err(Error::try_again("another command is using the epochs of the process")
                .at(self.folder.path())
                .hint("run the command again when 'stencil dirty' is not running")),
            Err(e) => Err(Error::io("cannot lock", self.folder.path(), e)),
        }
    }

    /// Reads the epochs, the oldest first.
    ///
    /// # Errors
    /// Returns an error if the record cannot be read, or if this program cannot have written it.
    pub fn read(&self) -> Result<Vec<Epoch>> {
        let read = || -> io::Result<Vec<Epoch>> {
            let epochs: Vec<Epoch> = match runtime::read(&self.folder, FILE, MAX_RECORD) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
                text => serde_json::from_slice(&text?)?,
            };
            match epochs.iter().all(|epoch| is_plain_name(&epoch.name)) {
                true => Ok(epochs),
                false => Err(io::Error::new(ErrorKind::InvalidData, "invalid name")),
            }
        };
        read().map_err(|e| {
            let path = self.folder.path_of(FILE);
            let hint = format!("remove {} and mark another epoch", self.folder.path().display());
            Error::failed("cannot use the epochs of a process").at(path).because(e).hint(hint)
        })
    }

    /// Replaces the epochs.
    ///
    /// # Errors
    /// Returns an error if the record would be larger than a record may be, or if it cannot be written.
    pub fn write(&self, epochs: &[Epoch]) -> Result<()> {
        let path = self.folder.path_of(FILE);
        let text = serde_json::to_vec(epochs)
            .map_err(|e| Error::failed("cannot write the epochs of a process").because(e.into()))?;
        if text.len() as u64 > MAX_RECORD.get() {
            return Err(Error::failed(format!(
                "cannot record the epoch: the epochs of the process would take more than {MAX_RECORD}"
            ))
            .at(&path)
            .hint(format!(
                "remove {}, which forgets the epochs of the process",
                self.folder.path().display()
            )));
        }
        runtime::replace(&self.folder, FILE, &text)
            .map_err(|e| runtime::failed("cannot write the epochs of a process", &path, e))
    }

    /// Removes the record.
    pub fn remove(self) {
        if let Err(error) = self.all.remove_tree(&self.name) {
            log::warn!("cannot remove {}: {error}", self.folder.path().display());
        }
    }
}

fn name_of(process: ProcessId) -> String {
    let ProcessId { pid, identity } = process;
    let namespace = probe::pid_namespace().map_or_else(String::new, |namespace| format!("-{namespace}"));
    format!("{pid}-{identity}{namespace}")
}

/// Returns the process of a record; `None` for other names, and for a process of another PID namespace.
fn process_of(name: &str) -> Option<ProcessId> {
    let mut parts = name.split('-').map(|part| part.parse::<u64>().ok());
    let process = ProcessId { pid: u32::try_from(parts.next()??).ok()?, identity: parts.next()?? };
    (name_of(process) == name).then_some(process)
}

/// Removes the epochs of processes that have ended.
///
/// # Errors
/// Returns an error if a directory cannot be read or removed.
pub fn sweep() -> Result<()> {
    let Some(all) = runtime::open(EPOCHS)? else { return Ok(()) };
    let names = all.names().map_err(|e| Error::io("cannot read the epochs", all.path(), e))?;
    let ended = |name: &&str| process_of(name).is_some_and(|process| !process.is_alive());
    for name in names.iter().filter_map(|name| name.to_str()).filter(ended) {
        match all.remove_tree(name) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the epochs of a process", all.path_of(name), e));
            }
            _ => log::debug!("removed the epochs of a process that has ended: {name}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_process() {
        let me = ProcessId::current().unwrap();
        assert_eq!(process_of(&name_of(me)), Some(me));
        for other in ["", "1", "1-2-3-4", "x-2", "1-2-3", "../1-2"] {
            assert_eq!(process_of(other), None, "{other}");
        }
    }
}
