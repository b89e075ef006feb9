//! The records of clones that were launched here: one folder each in `runtime_dir()/clones`.
//!
//! A folder is made before its process and removed after it, so a process without a folder cannot be
//! ours, and a folder without a living process names a clone that has ended.
//!
//! Clones of one call belong to one [`Launch`], which holds them by one marker file: taking it away lets all
//! of them go at once. If the launcher dies before, whoever comes next ends what is left ([`sweep`]).

mod entry;
mod launch;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::control::runtime_dir;
use crate::error::{Error, Result};
use crate::sys::procfs;

pub use entry::{Entry, Kind, Touched};
pub use launch::{Launch, NewEntry, abort, is_held, sweep};

const RECORD: &str = "clone.json";

/// The runtime directory from the root: clones and helpers do not stay in this process's folder.
pub fn runtime_root() -> PathBuf {
    std::path::absolute(runtime_dir()).unwrap_or_else(|_| runtime_dir())
}

/// The folder that holds all records.
pub fn clones_dir() -> PathBuf {
    runtime_root().join("clones")
}

fn launches_dir() -> PathBuf {
    runtime_root().join("launches")
}

/// All records, oldest first, clones that have ended among them.
///
/// # Errors
/// When the folder of clones cannot be read. A record that cannot be read is logged and left out.
pub fn list() -> Result<Vec<Entry>> {
    let all = clones_dir();
    let folders = match fs::read_dir(&all) {
        Ok(folders) => folders,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Error::io("cannot read the folder of clones", &all, e)),
    };
    let mut entries = vec![];
    for folder in folders {
        let path = folder.map_err(|e| Error::io("cannot read the folder of clones", &all, e))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        match load(&path) {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => {}
            Err(error) => log::warn!("{error}"),
        }
    }
    entries.sort_by(|a, b| (a.created, a.index, &a.id).cmp(&(b.created, b.index, &b.id)));
    Ok(entries)
}

/// The clone with that id.
///
/// # Errors
/// [`Code::NotFound`](crate::error::Code::NotFound) when there is none.
pub fn find(id: &str) -> Result<Entry> {
    // An id is one folder's name, never a path.
    let entry = if id.chars().all(|c| c.is_ascii_alphanumeric()) && !id.is_empty() {
        load(&clones_dir().join(id))?
    } else {
        None
    };
    entry.ok_or_else(|| {
        Error::not_found(format!("no clone has the id '{id}'"))
            .remedy("see `stencil ps` for the clones that are")
    })
}

fn load(dir: &Path) -> Result<Option<Entry>> {
    let path = dir.join(RECORD);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(Error::io("cannot read the record of a clone", &path, e)),
    };
    let mut entry: Entry = serde_json::from_slice(&bytes).map_err(|e| {
        Error::failed(format!("the record of a clone cannot be understood: {e}"))
            .at(&path)
            .remedy("if no process of that clone runs, remove its folder")
    })?;
    // What is removed later is where the record was found, not where it says.
    entry.dir = dir.to_owned();
    Ok(Some(entry))
}

/// A short name that nobody else has: `c` and seven hex digits.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn random_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let uuid = procfs::read_text(path)?;
    let hex: String = uuid.chars().filter(char::is_ascii_hexdigit).take(7).collect();
    if hex.len() < 7 {
        return Err(Error::failed("the kernel gives no random number").at(path));
    }
    Ok(format!("c{hex}"))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn a_record_reads_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry {
            id: "c0123456".into(),
            pid: 12,
            identity: 34,
            name: "web:v1".into(),
            template: "ab".repeat(32),
            kind: Kind::Simulated,
            dir: dir.path().to_owned(),
            created: 56,
            index: 7,
            launch: "c7654321".into(),
            touched: Some(Touched { read_pages: 8, written_pages: 9 }),
            ports: BTreeMap::from([("80".into(), 40_000)]),
            uuid: None,
            disks: BTreeSet::from(["root".into()]),
            disk_dir: Some("/var/tmp".into()),
            pid_namespace: Some(10),
        };
        assert!(entry.is_foreign() && entry.process().is_none() && entry.remove().is_err());
        entry.save().unwrap();
        assert_eq!(load(dir.path()).unwrap(), Some(entry));
        fs::write(dir.path().join(RECORD), "{").unwrap();
        assert!(load(dir.path()).is_err());
    }

    #[test]
    fn ids_are_no_pids_and_no_paths() {
        assert!(random_id().unwrap().parse::<u32>().is_err());
        assert!(find("../mounts").is_err());
        assert!(find("").is_err());
    }
}
