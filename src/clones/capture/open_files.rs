//! Files that QEMU has open. The capture opens them again by their paths and compares device and inode: a path can lead
//! to another file meanwhile, and a template must never have the RAM of one guest and the disk of another.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::vm::{no_vm_here, path_of};
use crate::error::{Error, Result};

/// A file, whatever its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    dev: u64,
    ino: u64,
}

impl FileId {
    /// The file of this metadata.
    pub fn of(meta: &Metadata) -> FileId {
        FileId { dev: meta.dev(), ino: meta.ino() }
    }

    /// The file at this path.
    ///
    /// # Errors
    /// When there is none that can be looked at.
    pub fn at(path: &Path) -> Result<FileId> {
        let meta = fs::metadata(path).map_err(|e| Error::io("cannot look at a file of the VM", path, e))?;
        Ok(FileId::of(&meta))
    }

    /// Checks that this path still leads to this file.
    ///
    /// # Errors
    /// When another file is there, or none.
    pub fn must_be_at(self, path: &Path) -> Result<()> {
        let found = match fs::metadata(path) {
            Ok(meta) if FileId::of(&meta) == self => return Ok(()),
            Ok(meta) => FileId::of(&meta).to_string(),
            Err(e) => crate::error::errno_text(&e),
        };
        Err(Error::failed(format!("the path leads to another file ({found}) than the VM's image ({self})"))
            .at(path)
            .remedy(format!("put the VM's image back to that path: `find DIR -inum {}` finds it", self.ino)))
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {} of device {}:{}", self.ino, major(self.dev), minor(self.dev))
    }
}

/// Regular files that a process has open.
pub struct OpenFiles {
    pid: u32,
    files: Vec<(FileId, PathBuf)>,
}

impl OpenFiles {
    /// Reads the descriptors of a process.
    ///
    /// # Errors
    /// When the process is gone, or is another user's.
    pub fn of(pid: u32) -> Result<OpenFiles> {
        let place = PathBuf::from(format!("/proc/{pid}/fd"));
        let list = fs::read_dir(&place).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => no_vm_here(pid).because(e),
            _ => Error::io("cannot list the files that QEMU has open", &place, e),
        })?;
        let file = |entry: fs::DirEntry| {
            // The kernel follows the link to the open file itself, also where its name is gone.
            let meta = fs::metadata(entry.path()).ok().filter(Metadata::is_file)?;
            Some((FileId::of(&meta), fs::read_link(entry.path()).ok()?))
        };
        Ok(OpenFiles { pid, files: list.flatten().filter_map(file).collect() })
    }

    /// Checks that the process has this file open, which was found at this path.
    ///
    /// # Errors
    /// A refusal that names the path, both files, and what to do.
    pub fn must_have(&self, path: &Path, found: FileId) -> Result<()> {
        if self.files.iter().any(|(id, _)| *id == found) {
            return Ok(());
        }
        let pid = self.pid;
        // The kernel adds this to the name of a file that was removed or replaced.
        let removed = PathBuf::from(format!("{} (deleted)", path.display()));
        let own = self.files.iter().find(|(_, name)| *name == removed);
        let has = match own {
            Some((id, _)) => format!("{id}, which has no name any more"),
            None => {
                let all: Vec<String> =
                    self.files.iter().map(|(id, name)| format!("{} ({id})", name.display())).collect();
                format!(
                    "none of that path but {}",
                    if all.is_empty() { "no file".into() } else { all.join(", ") }
                )
            }
        };
        let remedy = match own {
            Some(_) => format!(
                "a file without a name ends with its process: save from inside the guest what you need, or copy the \
                 disk with QMP (blockdev-backup) while process {pid} lives; then start the VM anew from one file"
            ),
            None => "rename the VM's own file back to that path, then capture again".to_owned(),
        };
        Err(Error::usage(format!(
            "a file of the VM was replaced: its path leads to {found}, QEMU (process {pid}) has open {has}"
        ))
        .at(path)
        .remedy(remedy))
    }
}

/// A file of the VM that this process has open as well.
struct Held {
    path: PathBuf,
    id: FileId,
    file: File,
}

/// The images of a VM's disks, open in this process.
pub struct HeldFiles {
    pid: u32,
    all: Vec<Held>,
}

impl HeldFiles {
    /// Opens the files at these paths of the process's view, which must be those that it has open.
    ///
    /// # Errors
    /// When one cannot be opened, or is another file than the process has.
    pub fn open<'a>(pid: u32, paths: impl Iterator<Item = &'a Path>) -> Result<HeldFiles> {
        let mut all: Vec<Held> = vec![];
        for path in paths {
            if all.iter().any(|held| held.path == path) {
                continue;
            }
            let place = path_of(pid, path);
            let failed = |e| Error::io("cannot open the VM's disk", &place, e);
            let file = File::open(&place).map_err(failed)?;
            let id = FileId::of(&file.metadata().map_err(failed)?);
            all.push(Held { path: path.to_owned(), id, file });
        }
        let held = HeldFiles { pid, all };
        held.are_open_in_vm()?;
        Ok(held)
    }

    /// Checks that the VM has all of them open now.
    ///
    /// # Errors
    /// When it has another file in place of one.
    pub fn are_open_in_vm(&self) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        let open = OpenFiles::of(self.pid)?;
        self.all.iter().try_for_each(|held| open.must_have(&held.path, held.id))
    }

    /// Checks against the sizes that QEMU knows of its block nodes that two images have not been exchanged for one
    /// another: QEMU has both open then, and does not tell which is which.
    ///
    /// # Errors
    /// When what QEMU says of one image is true of another one instead.
    pub fn are_not_exchanged(&self, nodes: &[Value]) -> Result<()> {
        let is_like = |held: &Held, node: &Value| {
            let size = |key| node.pointer(&format!("/image/{key}")).and_then(Value::as_u64);
            let meta = held.file.metadata().ok()?;
            // QEMU counts in sectors.
            let length = meta.len().div_ceil(512) * 512;
            Some(size("virtual-size")? == length && size("actual-size")? == meta.blocks() * 512)
        };
        for node in nodes.iter().filter(|node| node.get("drv").and_then(Value::as_str) == Some("file")) {
            let path = node.get("file").and_then(Value::as_str).map(Path::new);
            let Some(own) = self.all.iter().find(|held| Some(held.path.as_path()) == path) else { continue };
            if is_like(own, node) != Some(false) {
                continue;
            }
            let other = |held: &&Held| held.id != own.id && is_like(held, node) == Some(true);
            if let Some(other) = self.all.iter().find(other) {
                return Err(Error::usage(format!(
                    "files of the VM were exchanged: the path leads to {}, and what QEMU has open there has the sizes of \
                     {} at {}",
                    own.id,
                    other.id,
                    other.path.display()
                ))
                .at(&own.path)
                .remedy("rename the VM's files back to their paths, then capture again"));
            }
        }
        Ok(())
    }

    fn find(&self, path: &Path) -> Result<&Held> {
        let held = self.all.iter().find(|held| held.path == path);
        held.ok_or_else(|| Error::failed("this disk of the VM was not opened").at(path))
    }

    /// The file of this path.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn id(&self, path: &Path) -> Result<FileId> {
        Ok(self.find(path)?.id)
    }

    /// The open file of this path.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn file(&self, path: &Path) -> Result<&File> {
        Ok(&self.find(path)?.file)
    }

    /// A path by which another process opens that very file, for as long as this process holds it.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn place(&self, path: &Path) -> Result<PathBuf> {
        Ok(format!("/proc/{}/fd/{}", std::process::id(), self.file(path)?.as_raw_fd()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_told_from_the_one_that_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("disk"), dir.path().join("other"));
        fs::write(&path, "first").unwrap();
        let _open = File::open(&path).unwrap();
        let pid = std::process::id();
        let first = FileId::at(&path).unwrap();
        OpenFiles::of(pid).unwrap().must_have(&path, first).unwrap();
        first.must_be_at(&path).unwrap();
        fs::write(&other, "second").unwrap();
        fs::rename(&other, &path).unwrap();
        let second = FileId::at(&path).unwrap();
        let error = OpenFiles::of(pid).unwrap().must_have(&path, second).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&first.to_string()) && text.contains(&second.to_string()), "{text}");
        assert!(first.must_be_at(&path).is_err());
    }
}
