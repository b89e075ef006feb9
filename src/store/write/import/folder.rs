//! Recognition of the directory that a VMM has written a snapshot into: which file is the guest's memory, which one the
//! device state. Every file is opened once, without following a symbolic link, and imported from that descriptor, so
//! that the owner of the directory cannot replace a recognized file by a link.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FileType;
use serde::Serialize;

use super::magic::{HEAD, identify, is_file_system};
use super::request::{ImportFile, ImportFormat, Opened, Source};
use crate::error::{Error, Result};
use crate::store::FileKind;
use crate::store::format::firecracker::FirecrackerState;
use crate::store::format::image::MAX_FILES;
use crate::sys::files::directory::Directory;
use crate::units::to_usize;

const EXPECTED: &str = "name a directory with a Firecracker snapshot (a state file, and a memory file of whole MiB), a Cloud \
                        Hypervisor snapshot (config.json, state.json, memory-ranges) or a Kata template (memory, state), \
                        or a directory of such directories; import other files one by one: stencil import MEMORY NAME \
                        --file NAME=PATH";

/// Largest number of file names in an error message.
const MAX_NAMES: usize = 8;

/// The contents of a directory.
#[derive(Debug)]
pub enum Folder {
    /// The files of one snapshot.
    Snapshot(Snapshot),
    /// Only directories: their names, sorted.
    Folders(Vec<String>),
}

/// A recognized directory with its open files.
#[derive(Debug)]
pub struct Snapshot {
    /// How the files were recognized.
    pub recognized: Recognized,
    /// All files of the directory.
    pub files: Vec<ImportFile>,
    /// Format that the files must have.
    pub format: ImportFormat,
}

/// How the files of a directory were recognized.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recognized {
    /// The VMM: `firecracker`, `cloud-hypervisor` or `kata`.
    pub vmm: &'static str,
    /// Name of the memory file; `None` if the directory has none, and the request names it.
    pub memory: Option<String>,
    /// Name of the file with the device state.
    pub state: String,
    /// Version of a Firecracker snapshot's format.
    pub version: Option<String>,
    /// Processor architecture of a Firecracker snapshot.
    pub machine: Option<&'static str>,
    /// Names of all other files.
    pub others: Vec<String>,
}

impl fmt::Display for Recognized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.vmm {
            "firecracker" => "Firecracker snapshot: ",
            "kata" => "Kata template: ",
            _ => "Cloud Hypervisor snapshot: ",
        })?;
        if let Some(memory) = &self.memory {
            write!(f, "memory '{memory}', ")?;
        }
        write!(f, "state '{}'", self.state)?;
        if let (Some(version), Some(machine)) = (&self.version, self.machine) {
            write!(f, " (version {version}, {machine})")?;
        }
        match self.others.is_empty() {
            true => Ok(()),
            false => write!(f, "; other files: {}", quoted(&self.others)),
        }
    }
}

/// A regular file of the directory.
#[derive(Debug)]
struct Found {
    name: String,
    size: u64,
    head: Vec<u8>,
}

impl Folder {
    /// Lists the directory at `path`, and recognizes its files unless it has only directories. A file with the same
    /// name as a file in `given` is skipped. A file of kind ram in `given` may be the memory.
    ///
    /// # Errors
    /// Returns a usage error that names the object if the directory has anything but files of a known snapshot or
    /// directories.
    pub fn open(path: &Path, given: &[ImportFile]) -> Result<Folder> {
        let directory = Directory::open(path).map_err(|e| Error::io("cannot read the directory", path, e))?;
        Folder::of(&directory, path, given)
    }

    /// Same as [`Folder::open`] for a directory in `parent`, which must not be a symbolic link.
    ///
    /// # Errors
    /// Same as [`Folder::open`].
    pub fn open_below(parent: &Path, name: &str) -> Result<Folder> {
        let path = parent.join(name);
        let directory = Directory::open(parent).and_then(|parent| parent.folder(name));
        Folder::of(&directory.map_err(|e| Error::io("cannot read the directory", &path, e))?, &path, &[])
    }

    fn of(directory: &Directory, path: &Path, given: &[ImportFile]) -> Result<Folder> {
        let fail = |e| Error::io("cannot read the directory", path, e);
        let mut names: Vec<OsString> = directory.names().map_err(fail)?;
        names.sort();
        let (mut files, mut folders) = (Vec::new(), Vec::new());
        for name in names {
            let path = directory.path_of(&name);
            let refuse = |what: &str| {
                Err(Error::usage(format!("cannot import {what} from a snapshot directory")).at(&path).hint(
                    "move this object out of the directory, or import the files one by one with --state and \
                     --file NAME=PATH",
                ))
            };
            let Some(text) = name.to_str() else { return refuse("a file whose name is not UTF-8") };
            let stat = directory.metadata(&name).map_err(|e| Error::io("cannot read", &path, e))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => files.push(text.to_owned()),
                FileType::Directory => folders.push(text.to_owned()),
                FileType::Symlink => return refuse("a symbolic link"),
                FileType::Socket => return refuse("a socket"),
                FileType::Fifo => return refuse("a FIFO"),
                _ => return refuse("a device"),
            }
        }
        match (files.is_empty(), folders.first()) {
            (true, Some(_)) => return Ok(Folder::Folders(folders)),
            (false, Some(folder)) => {
                return Err(Error::usage("cannot import a directory that has both files and directories")
                    .at(directory.path_of(folder))
                    .hint("move the subdirectories out of the directory: a snapshot has only files"));
            }
            _ => {}
        }
        files.retain(|name| given.iter().all(|file| file.name != *name));
        if files.len() > MAX_FILES {
            return Err(Error::usage(format!(
                "the directory has {} files, but a template can have at most {MAX_FILES}",
                files.len()
            ))
            .at(path)
            .hint(EXPECTED));
        }
        Snapshot::open(directory, files, given.iter().any(|file| file.kind == FileKind::Ram))
            .map(Folder::Snapshot)
    }
}

impl Snapshot {
    fn open(directory: &Directory, names: Vec<String>, has_memory: bool) -> Result<Snapshot> {
        let (mut found, mut opened) = (Vec::new(), Vec::new());
        for name in names {
            let path = directory.path_of(&name);
            let fail = |e| Error::io("cannot read", &path, e);
            let file = directory.file(&name).map_err(fail)?;
            let size = file.metadata().map_err(fail)?.len();
            let mut head = vec![0; to_usize(size.min(HEAD as u64))];
            file.read_exact_at(&mut head, 0).map_err(fail)?;
            found.push(Found { name, size, head });
            opened.push(Opened { path, file: Arc::new(file) });
        }
        let recognized = recognize(&found, has_memory)
            .map_err(|(why, hint)| Error::usage(why).at(directory.path()).hint(hint))?;
        let files = found.into_iter().zip(opened).map(|(found, opened)| ImportFile {
            kind: match recognized.memory.as_ref() == Some(&found.name) {
                true => FileKind::Ram,
                false => FileKind::Blob,
            },
            name: found.name,
            source: Source::Opened(opened),
        });
        let format = match recognized.vmm {
            "firecracker" => ImportFormat::Firecracker,
            _ => ImportFormat::Auto,
        };
        Ok(Snapshot { files: files.collect(), format, recognized })
    }
}

/// Recognizes the files of a directory. `has_memory` is true if the request names the memory.
///
/// # Errors
/// Returns a message and a hint.
fn recognize(found: &[Found], has_memory: bool) -> std::result::Result<Recognized, (String, String)> {
    let has = |name: &str| found.iter().any(|file| file.name == name);
    let recognized = |vmm, memory: Option<&str>, state: &str| Recognized {
        vmm,
        memory: memory.map(str::to_owned),
        state: state.to_owned(),
        version: None,
        machine: None,
        others: found
            .iter()
            .map(|file| file.name.clone())
            .filter(|name| Some(name.as_str()) != memory && name != state)
            .collect(),
    };
    let states: Vec<&Found> = found.iter().filter(|file| FirecrackerState::has_magic(&file.head)).collect();
    match states.as_slice() {
        [state] => {
            if state.name != "state" && has("state") {
                return Err((
                    format!(
                        "two candidates for the device state: '{}' is a Firecracker state file, and there is a file 'state'",
                        state.name
                    ),
                    "rename the file 'state', or move it out of the directory".into(),
                ));
            }
            let header = FirecrackerState::header(&state.head).map_err(|why| {
                (format!("the state file '{}' {why}", state.name), "take the snapshot again".to_owned())
            })?;
            let memory = if has_memory { None } else { Some(firecracker_memory(found, state)?) };
            let state = recognized("firecracker", memory, &state.name);
            Ok(Recognized { version: Some(header.version), machine: Some(header.machine), ..state })
        }
        [] if has("config.json") && has("state.json") => {
            let memory = has("memory-ranges").then_some("memory-ranges");
            if memory.is_none() && !has_memory {
                return Err((
                    "Cloud Hypervisor snapshot without 'memory-ranges': the memory of the VM is in the file of a shared \
                     memory zone"
                        .into(),
                    "add the file of the memory zone: --file NAME=PATH".into(),
                ));
            }
            Ok(recognized("cloud-hypervisor", memory, "state.json"))
        }
        [] if has("memory") && has("state") => Ok(recognized("kata", Some("memory"), "state")),
        [] if found.is_empty() => Err(("no snapshot found: the directory is empty".into(), EXPECTED.into())),
        [] => {
            let names: Vec<String> = found.iter().map(|file| file.name.clone()).collect();
            Err((format!("no snapshot found: the directory has {}", quoted(&names)), EXPECTED.into()))
        }
        [one, two, ..] => Err((
            format!("{} Firecracker state files, such as '{}' and '{}'", states.len(), one.name, two.name),
            "give each snapshot its own directory".into(),
        )),
    }
}

/// Finds the memory of a Firecracker snapshot: the only file of whole MiB that is not known to be a disk.
fn firecracker_memory<'a>(
    found: &'a [Found],
    state: &Found,
) -> std::result::Result<&'a str, (String, String)> {
    let is_memory = |file: &&Found| {
        let is_disk = is_file_system(&file.head) || identify(&file.head, &[]).is_some();
        file.name != state.name && file.size != 0 && file.size.is_multiple_of(1 << 20) && !is_disk
    };
    let names: Vec<String> = found.iter().map(|file| file.name.clone()).collect();
    let candidates: Vec<&Found> = found.iter().filter(is_memory).collect();
    match candidates.as_slice() {
        [memory] => Ok(&memory.name),
        [] => Err((
            format!(
                "no memory file in {}: the state is '{}', and no other file has a size of whole MiB",
                quoted(&names),
                state.name
            ),
            "check that the memory file is complete, or name it: --file NAME=PATH".into(),
        )),
        [one, two, ..] => Err((
            format!("ambiguous memory: '{}' and '{}' both have a size of whole MiB", one.name, two.name),
            "name the memory file with --file NAME=PATH, and the other one with --file NAME=PATH,kind=blob"
                .into(),
        )),
    }
}

fn quoted(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(MAX_NAMES).map(|name| format!("'{name}'")).collect();
    match names.len().saturating_sub(MAX_NAMES) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64, head: &[u8]) -> Found {
        Found { name: name.into(), size, head: head.into() }
    }

    const STATE: &[u8] = b"\0\0\0\x64\x86\x84\x19\x10\x07\x058.0.0 and so on";
    const MIB: u64 = 1 << 20;

    #[test]
    fn recognizes_firecracker_by_the_header_and_whole_mib() {
        let files =
            [file("a", 3 * MIB + 1, b""), file("m", 2 * MIB, b""), file("s", 99, STATE), file("t", 9, b"")];
        let found = recognize(&files, false).unwrap();
        assert_eq!((found.memory.as_deref(), found.state.as_str()), (Some("m"), "s"));
        assert_eq!(
            found.to_string(),
            "Firecracker snapshot: memory 'm', state 's' (version 8.0.0, x86_64); other files: 'a', 't'"
        );
        let mut ext4 = vec![0; HEAD];
        ext4[0x438..0x43a].copy_from_slice(b"\x53\xef");
        let disk = [file("disk", 9 * MIB, &ext4), file("m", 2 * MIB, b""), file("s", 99, STATE)];
        assert_eq!(recognize(&disk, false).unwrap().memory.as_deref(), Some("m"));
        for (files, words) in [
            (vec![file("s", 99, STATE)], "no memory file"),
            (vec![file("s", 99, STATE), file("m", MIB + 4096, b"")], "no memory file"),
            (
                vec![file("s", 99, STATE), file("m", MIB, b""), file("n", MIB, b"")],
                "'m' and 'n' both have a size of whole MiB",
            ),
            (vec![file("s", 99, STATE), file("t", 99, STATE), file("n", MIB, b"")], "'s' and 't'"),
            (
                vec![file("s", 99, STATE), file("state", 9, b""), file("n", MIB, b"")],
                "two candidates for the device state",
            ),
            (vec![file("s", 99, &STATE[..10]), file("n", MIB, b"")], "'s' has no readable version"),
        ] {
            let (why, _) = recognize(&files, false).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
        let given = recognize(&[file("s", 99, STATE), file("n", MIB, b"")], true).unwrap();
        assert_eq!((given.memory, given.others), (None, vec!["n".to_owned()]));
    }

    #[test]
    fn recognizes_other_vmms_by_file_names() {
        let names = |names: &[&str]| names.iter().map(|name| file(name, 7, b"x")).collect::<Vec<_>>();
        let found = |list: &[&str], given| {
            recognize(&names(list), given).map(|found| (found.vmm, found.memory)).map_err(|(why, _)| why)
        };
        let memory = |name: &str| Some(name.to_owned());
        let cloud = ["config.json", "memory-ranges", "state.json"];
        assert_eq!(found(&cloud, false), Ok(("cloud-hypervisor", memory("memory-ranges"))));
        assert_eq!(found(&["config.json", "state.json"], true), Ok(("cloud-hypervisor", None)));
        assert!(
            found(&["config.json", "state.json"], false).unwrap_err().contains("without 'memory-ranges'")
        );
        assert_eq!(found(&["memory", "state"], false), Ok(("kata", memory("memory"))));
        assert_eq!(
            found(&["config.json", "x"], false).unwrap_err(),
            "no snapshot found: the directory has 'config.json', 'x'"
        );
        assert_eq!(found(&[], false).unwrap_err(), "no snapshot found: the directory is empty");
    }
}
