//! The record of the simulated clones of one launch: one file, to which each event appends a line of JSON.
//!
//! ```text
//!   clones/c0123abc/clones.jsonl            the directory has the first part of the launch's id as its name
//!     {"common":{"entry":{…},"mapped":"…","touched":"…"}}
//!     {"clone":{"index":0,"pid":12,"identity":34}}      the clone c0123abc-0
//!     {"ended":{"index":0,"at":56,"exit_code":null,"signal":9}}
//!     {"removed":[0]}
//! ```
//! Only the launcher writes until the launch is over; later writers hold a lock on the file. A writer that was killed
//! may leave a last line without its end: readers ignore that line, and the next writer overwrites it. The removal of
//! the last clone removes the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{OFlags, fstat};
use serde::{Deserialize, Serialize};

use super::ending::Ending;
use super::entry::{Entry, Kind};
use super::layout::{CLONES, is_held, remove_directory};
use crate::control::runtime::{self, is_pid, trusted_folder};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::{file_locks, trust};
use crate::sys::process::{ProcessId, holders};
use crate::units::Bytes;

/// File in the directory of a simulated launch with the records of its clones.
pub(super) const SHARED_RECORD: &str = "clones.jsonl";

/// Maximum size of a file: 100 000 clones, each with its exit and its removal, need half of that.
const MAX_SIZE: Bytes = Bytes::new(32 << 20);

/// Time limit for the lock on a file. Another process holds the lock only while it writes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The common properties of the clones of a launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Common {
    /// The record of each clone, apart from its id, index and process. The id is the name of the directory.
    entry: Entry,
    /// First lines of the log of each clone.
    mapped: String,
    /// The pages that each clone has touched, in words.
    touched: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Common(Box<Common>),
    Clone {
        index: u32,
        pid: u32,
        identity: u64,
    },
    Ended {
        index: u32,
        #[serde(flatten)]
        ending: Ending,
    },
    Removed(Vec<u32>),
}

impl Line {
    fn to_text(lines: &[Line]) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        Ok(text)
    }
}

/// The record that a launcher writes.
#[derive(Debug)]
pub struct SharedRecord {
    common: Entry,
    file: File,
    length: u64,
}

impl SharedRecord {
    /// Creates the directory and the record of a launch without any clone. `entry` is the record that the clones have
    /// in common; `mapped` are the first lines of the log of each, and `touched` describes the pages that each has
    /// touched.
    ///
    /// # Errors
    /// Returns an error if the runtime directory cannot be written.
    pub(super) fn create(all: &Directory, entry: Entry, mapped: String, touched: String) -> Result<Self> {
        let (name, path) = (entry.id.clone(), entry.dir.join(SHARED_RECORD));
        let common = Common { entry, mapped, touched };
        let create = || -> io::Result<(File, u64)> {
            let directory = all.create_folder(&name, 0o700)?;
            let text = Line::to_text(&[Line::Common(Box::new(common.clone()))])?;
            let file = directory.create(SHARED_RECORD, 0o600)?;
            file.write_all_at(&text, 0)?;
            Ok((file, text.len() as u64))
        };
        let (file, length) = create().map_err(|e| not_written(&path, e))?;
        Ok(SharedRecord { common: common.entry, file, length })
    }

    /// Adds clones, and returns their records.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written.
    pub fn add(&mut self, clones: &[(u32, ProcessId)]) -> Result<Vec<Entry>> {
        let line = |(index, process): &(u32, ProcessId)| Line::Clone {
            index: *index,
            pid: process.pid,
            identity: process.identity,
        };
        self.append(&clones.iter().map(line).collect::<Vec<_>>())?;
        Ok(clones.iter().map(|(index, process)| clone_of(&self.common, *index, *process)).collect())
    }

    /// Removes a clone whose process has ended.
    ///
    /// # Errors
    /// Returns an error if the record cannot be written.
    pub fn remove(&mut self, index: u32) -> Result<()> {
        self.append(&[Line::Removed(vec![index])])
    }

    fn append(&mut self, lines: &[Line]) -> Result<()> {
        let append = |length: &mut u64| -> io::Result<()> {
            let text = Line::to_text(lines)?;
            self.file.write_all_at(&text, *length)?;
            *length += text.len() as u64;
            Ok(())
        };
        append(&mut self.length).map_err(|e| not_written(&self.common.dir.join(SHARED_RECORD), e))
    }
}

fn not_written(path: &Path, e: io::Error) -> Error {
    runtime::failed("cannot write the record of simulated clones", path, e)
}

fn clone_of(common: &Entry, index: u32, process: ProcessId) -> Entry {
    let id = format!("{}-{index}", common.id);
    Entry { id, index, pid: process.pid, identity: process.identity, ..common.clone() }
}

/// The contents of a record.
#[derive(Debug)]
struct Contents {
    common: Common,
    clones: BTreeMap<u32, (ProcessId, Option<Ending>)>,
}

impl Contents {
    fn parse(text: &[u8]) -> io::Result<Contents> {
        let invalid = |what| io::Error::new(ErrorKind::InvalidData, what);
        let mut lines = whole_lines(text).split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let first = lines.next().ok_or_else(|| invalid("missing first line"))?;
        let Line::Common(common) = serde_json::from_slice(first)? else {
            return Err(invalid("invalid first line"));
        };
        let mut contents = Contents { common: *common, clones: BTreeMap::new() };
        for line in lines {
            match serde_json::from_slice(line)? {
                Line::Clone { pid, .. } if !is_pid(pid) => return Err(invalid("invalid pid")),
                Line::Clone { index, pid, identity } => {
                    contents.clones.insert(index, (ProcessId { pid, identity }, None));
                }
                Line::Ended { index, ending } => {
                    contents.clones.entry(index).and_modify(|(_, its)| *its = Some(ending));
                }
                Line::Removed(indexes) => {
                    for index in indexes {
                        contents.clones.remove(&index);
                    }
                }
                Line::Common(_) => return Err(invalid("invalid line")),
            }
        }
        Ok(contents)
    }
}

/// Returns the text without a last line that has no end.
fn whole_lines(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    text.get(..end).unwrap_or_default()
}

/// Reads the clones of a launch from its open directory.
///
/// # Errors
/// Returns `NotFound` if the directory has no record of simulated clones, and an error if the record cannot be read or
/// is invalid.
pub(super) fn load(directory: &Directory) -> io::Result<Vec<Entry>> {
    let text = runtime::read(directory, SHARED_RECORD, MAX_SIZE)?;
    if whole_lines(&text).is_empty() {
        // The launcher was killed, or the disk was full. No clone starts before the first line is written.
        return Ok(vec![]);
    }
    let Contents { common: Common { mut entry, .. }, clones } = Contents::parse(&text)?;
    // The directory where the record was found is removed later, not the one that the record names.
    directory.path().clone_into(&mut entry.dir);
    let problem = entry.problem().or((entry.kind != Kind::Simulated).then_some("kind"));
    if let Some(field) = problem {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("invalid {field}")));
    }
    let clone = |(index, (process, ending))| Entry { ending, ..clone_of(&entry, index, process) };
    Ok(clones.into_iter().map(clone).collect())
}

/// Returns the log of a simulated clone that is ready.
///
/// # Errors
/// Returns an error if the record cannot be read: `NotFound` if the clones of its launch were removed.
pub fn simulated_log(entry: &Entry) -> io::Result<String> {
    let text = runtime::read(&Directory::open(&entry.dir)?, SHARED_RECORD, MAX_SIZE)?;
    let Common { mapped, touched, .. } = Contents::parse(&text)?.common;
    Ok(format!("{mapped}clone {}: {touched}\n", entry.index))
}

/// Opens and locks the record in a directory of all clones; `None` if it was removed.
fn open_locked(directory: &Path) -> Result<Option<File>> {
    let Some(all) = runtime::open(CLONES)? else { return Ok(None) };
    let path = directory.join(SHARED_RECORD);
    let open = || -> io::Result<File> {
        let directory = trusted_folder(&all, directory.file_name().unwrap_or_default())?;
        let file = directory.file_with(SHARED_RECORD, OFlags::RDWR)?;
        trust::expect(&fstat(&file)?)?;
        Ok(file)
    };
    let file = match open() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| not_written(&path, e))?,
    };
    match file_locks::wait(&file, true, LOCK_TIMEOUT, || false) {
        Ok(true) => Ok(Some(file)),
        Ok(false) => {
            let holders = holders::list_pids(&file_locks::flock_holders(&file));
            Err(Error::try_again("the record of simulated clones is locked by another process")
                .at(path)
                .hint(format!("resume or end the holder of the lock: {holders}")))
        }
        Err(e) => Err(not_written(&path, e)),
    }
}

/// Appends lines to a locked record.
fn append(file: &File, lines: &[Line]) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut last = [0];
    file.read_exact_at(&mut last, length.saturating_sub(1))?;
    let start = if last == *b"\n" { length } else { whole_lines(&read_all(file)?).len() as u64 };
    let text = Line::to_text(lines)?;
    file.write_all_at(&text, start).and_then(|()| file.set_len(start + text.len() as u64)).inspect_err(|_| {
        // Otherwise a part of the text would look like the line of a killed writer.
        let _ = file.set_len(start);
    })
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    let length = usize::try_from(length).ok().filter(|_| length <= MAX_SIZE.get());
    let mut text = vec![0; length.ok_or_else(|| io::Error::from(ErrorKind::FileTooLarge))?];
    file.read_exact_at(&mut text, 0)?;
    Ok(text)
}

/// Records how clones of one launch have ended. Does nothing if the record was removed.
///
/// # Errors
/// Returns an error if the record cannot be written.
pub fn save_endings(directory: &Path, endings: &[(u32, Ending)]) -> Result<()> {
    let Some(file) = open_locked(directory)? else { return Ok(()) };
    let line = |(index, ending): &(u32, Ending)| Line::Ended { index: *index, ending: *ending };
    append(&file, &endings.iter().map(line).collect::<Vec<_>>())
        .map_err(|e| not_written(&directory.join(SHARED_RECORD), e))
}

/// Removes the records of clones of one launch, and its directory with the last of them. Clones without a record are
/// skipped.
///
/// # Errors
/// Returns an error if the record cannot be read or written, or the directory cannot be removed.
pub(super) fn remove(directory: &Path, indexes: &BTreeSet<u32>) -> Result<()> {
    let Some(file) = open_locked(directory)? else { return Ok(()) };
    let failed = |e| not_written(&directory.join(SHARED_RECORD), e);
    let Contents { common, clones } =
        read_all(&file).and_then(|text| Contents::parse(&text)).map_err(failed)?;
    let (gone, left): (Vec<u32>, Vec<u32>) = clones.keys().partition(|index| indexes.contains(index));
    if left.is_empty() {
        // All clones of a held launch are removed only if the launch has failed. The launch then removes the directory
        // itself, and a line in the record would need free disk space.
        return if is_held(&common.entry.launch) { Ok(()) } else { remove_directory(directory) };
    }
    if gone.is_empty() { Ok(()) } else { append(&file, &[Line::Removed(gone)]).map_err(failed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn common(directory: &Path) -> Value {
        json!({
            "id": "c0123456", "pid": 0, "identity": 0, "reference": "web:1", "digest": "ab".repeat(32),
            "kind": "simulated", "dir": directory, "created": 1, "index": 0, "launch": "c0123456.1.1",
            "store": {"path": "/store", "id": "12ab"}, "ports": {}, "disks": [], "jail_bytes": 0,
        })
    }

    #[test]
    fn reads_what_was_appended_and_ignores_a_line_without_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let all = Directory::open(dir.path()).unwrap();
        let entry: Entry = serde_json::from_value(common(&dir.path().join("c0123456"))).unwrap();
        let mut record = SharedRecord::create(&all, entry, "mapped\n".into(), "read".into()).unwrap();
        let directory = all.folder("c0123456").unwrap();
        assert_eq!(load(&directory).unwrap(), []);
        let process = |pid| ProcessId { pid, identity: 7 };
        let added = record.add(&[(0, process(12)), (1, process(13))]).unwrap();
        assert_eq!((added[1].id.as_str(), added[1].process()), ("c0123456-1", Some(process(13))));
        record.remove(0).unwrap();
        let third = record.add(&[(2, process(14))]).unwrap();
        assert_eq!(load(&directory).unwrap(), [added[1].clone(), third[0].clone()]);
        assert_eq!(simulated_log(&third[0]).unwrap(), "mapped\nclone 2: read\n");

        // A writer that was killed.
        let file = directory.file_with(SHARED_RECORD, OFlags::RDWR).unwrap();
        file.write_all_at(b"{\"removed\":[1", file.metadata().unwrap().len()).unwrap();
        assert_eq!(load(&directory).unwrap().len(), 2);
        let ending = Ending { at: 5, exit_code: None, signal: Some(9) };
        append(&file, &[Line::Ended { index: 1, ending }, Line::Removed(vec![2])]).unwrap();
        assert_eq!(load(&directory).unwrap(), [Entry { ending: Some(ending), ..added[1].clone() }]);
    }

    #[test]
    fn refuses_invalid_records() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap().create_folder("c0123456", 0o700).unwrap();
        let file = directory.create(SHARED_RECORD, 0o600).unwrap();
        let load = |entry: &Value, line: &str| {
            let first = json!({"common": {"entry": entry, "mapped": "", "touched": ""}});
            let text = format!("{first}\n{line}\n");
            file.set_len(0).unwrap();
            file.write_all_at(text.as_bytes(), 0).unwrap();
            load(&directory)
        };
        let valid = common(directory.path());
        let clone = json!({"clone": {"index": 1, "pid": 12, "identity": 34}}).to_string();
        assert_eq!(load(&valid, &clone).unwrap().len(), 1);
        for (field, value) in [("kind", "qemu"), ("id", "c7654321"), ("launch", "../x"), ("digest", "x")] {
            let mut entry = valid.clone();
            entry[field] = value.into();
            let refused = load(&entry, &clone).unwrap_err().to_string();
            assert!(refused.contains(field), "{refused}");
        }
        for line in ["{", &clone.replace("12", "0"), &clone.replace("12", "8388608"), "{\"common\":1}"] {
            load(&valid, line).unwrap_err();
        }
        file.set_len(0).unwrap();
        assert_eq!(super::load(&directory).unwrap(), [], "a launcher that was killed before the first line");
        file.write_all_at(b"{\"common\":{", 0).unwrap();
        assert_eq!(super::load(&directory).unwrap(), []);
    }
}
