//! Files that QEMU has open. The capture opens the same paths and compares device and inode numbers: a path may lead to
//! another file by now, and a template must never combine the RAM of one guest with the disk of another.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::vm_process::{no_vm_here, path_of};
use crate::error::{Error, Result};

/// The identity of a file: device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    dev: u64,
    ino: u64,
}

impl FileId {
    /// Returns the identity of the file with this metadata.
    pub fn of(meta: &Metadata) -> FileId {
        FileId { dev: meta.dev(), ino: meta.ino() }
    }

    /// Returns the identity of the file at a path.
    ///
    /// # Errors
    /// Returns an error if `stat(2)` fails.
    pub fn at(path: &Path) -> Result<FileId> {
        let meta = fs::metadata(path)
            .map_err(|e| Error::io("cannot get the metadata of a file of the VM", path, e))?;
        Ok(FileId::of(&meta))
    }

    /// Checks that a path still leads to this file.
    ///
    /// # Errors
    /// Returns an error if the path leads to another file or to none.
    pub fn must_be_at(self, path: &Path) -> Result<()> {
        let found = match fs::metadata(path) {
            Ok(meta) if FileId::of(&meta) == self => return Ok(()),
            Ok(meta) => FileId::of(&meta).to_string(),
            Err(e) => crate::error::errno_text(&e),
        };
        Err(Error::failed(format!("the image of the VM was replaced: expected {self}, found {found}"))
            .at(path)
            .hint(format!(
                "find the VM's image with `find DIR -inum {}` and rename it to this path",
                self.ino
            )))
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {} of device {}:{}", self.ino, major(self.dev), minor(self.dev))
    }
}

/// The regular files that a process has open.
pub struct OpenFiles {
    pid: u32,
    files: Vec<(FileId, PathBuf)>,
}

impl OpenFiles {
    /// Lists the open files of a process.
    ///
    /// # Errors
    /// Returns an error if the process does not exist or belongs to another user.
    pub fn of(pid: u32) -> Result<OpenFiles> {
        let place = PathBuf::from(format!("/proc/{pid}/fd"));
        let list = fs::read_dir(&place).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => no_vm_here(pid).because(e),
            _ => Error::io("cannot list the files that QEMU has open", &place, e),
        })?;
        let file = |entry: fs::DirEntry| {
            // The kernel resolves this link to the open file itself, even if the file has no name any more.
            let meta = fs::metadata(entry.path()).ok().filter(Metadata::is_file)?;
            Some((FileId::of(&meta), fs::read_link(entry.path()).ok()?))
        };
        Ok(OpenFiles { pid, files: list.flatten().filter_map(file).collect() })
    }

    /// Checks that the process has the file open that was found at a path.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) with the path and both files if the process has another file
    /// open.
    pub fn must_have(&self, path: &Path, found: FileId) -> Result<()> {
        if self.files.iter().any(|(id, _)| *id == found) {
            return Ok(());
        }
        let pid = self.pid;
        // The kernel appends this suffix to the name of a file that was removed or replaced.
        let deleted = PathBuf::from(format!("{} (deleted)", path.display()));
        let original = self.files.iter().find(|(_, name)| *name == deleted);
        let open = match original {
            Some((id, _)) => format!("{id}, which has no name any more"),
            None => {
                let all: Vec<String> =
                    self.files.iter().map(|(id, name)| format!("{} ({id})", name.display())).collect();
                match all.is_empty() {
                    true => "no regular file".to_owned(),
                    false => format!("only other files: {}", all.join(", ")),
                }
            }
        };
        let remedy = match original {
            Some(_) => format!(
                "the open file is lost when process {pid} exits: save its data from inside the guest, or copy the disk \
                 with QMP blockdev-backup, then restart the VM with one file"
            ),
            None => "rename the VM's file back to that path, then capture again".to_owned(),
        };
        Err(Error::usage(format!(
            "a file of the VM was replaced: its path leads to {found}, but QEMU (process {pid}) has open: {open}"
        ))
        .at(path)
        .hint(remedy))
    }
}

/// An image of the VM that this process has open too.
struct HeldFile {
    path: PathBuf,
    id: FileId,
    file: File,
}

/// The images of a VM's disks, held open in this process.
pub struct HeldFiles {
    pid: u32,
    all: Vec<HeldFile>,
}

impl HeldFiles {
    /// Opens the files at these paths, as the process sees them.
    ///
    /// # Errors
    /// Returns an error if a file cannot be opened, and [`Code::Usage`](crate::error::Code::Usage) if the process has
    /// another file open.
    pub fn open<'a>(pid: u32, paths: impl Iterator<Item = &'a Path>) -> Result<HeldFiles> {
        let mut all: Vec<HeldFile> = vec![];
        for path in paths {
            if all.iter().any(|held| held.path == path) {
                continue;
            }
            let place = path_of(pid, path);
            let failed = |e| Error::io("cannot open the VM's disk", &place, e);
            let file = File::open(&place).map_err(failed)?;
            let id = FileId::of(&file.metadata().map_err(failed)?);
            all.push(HeldFile { path: path.to_owned(), id, file });
        }
        let held = HeldFiles { pid, all };
        held.are_open_in_vm()?;
        Ok(held)
    }

    /// Checks that the VM has all these files open now.
    ///
    /// # Errors
    /// Same as [`OpenFiles::must_have`].
    pub fn are_open_in_vm(&self) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        let open = OpenFiles::of(self.pid)?;
        self.all.iter().try_for_each(|held| open.must_have(&held.path, held.id))
    }

    /// Checks that the paths of two images were not exchanged. Compares the sizes that QEMU reports for its block
    /// nodes, because QEMU has both files open and does not report which is which.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the sizes of a block node match another image instead.
    pub fn are_not_exchanged(&self, nodes: &[Value]) -> Result<()> {
        let is_like = |held: &HeldFile, node: &Value| {
            let size = |key| node.pointer(&format!("/image/{key}")).and_then(Value::as_u64);
            let meta = held.file.metadata().ok()?;
            // QEMU rounds sizes up to sectors of 512 bytes.
            let length = meta.len().div_ceil(512) * 512;
            Some(size("virtual-size")? == length && size("actual-size")? == meta.blocks() * 512)
        };
        for node in nodes.iter().filter(|node| node.get("drv").and_then(Value::as_str) == Some("file")) {
            let path = node.get("file").and_then(Value::as_str).map(Path::new);
            let Some(own) = self.all.iter().find(|held| Some(held.path.as_path()) == path) else { continue };
            if is_like(own, node) != Some(false) {
                continue;
            }
            let other = |held: &&HeldFile| held.id != own.id && is_like(held, node) == Some(true);
            if let Some(other) = self.all.iter().find(other) {
                return Err(Error::usage(format!(
                    "files of the VM were exchanged: the path leads to {}, but the file that QEMU opened there \
                     has the sizes of {}, which is now at {}",
                    own.id,
                    other.id,
                    other.path.display()
                ))
                .at(&own.path)
                .hint("rename the VM's files back to their paths, then capture again"));
            }
        }
        Ok(())
    }

    fn find(&self, path: &Path) -> Result<&HeldFile> {
        let held = self.all.iter().find(|held| held.path == path);
        held.ok_or_else(|| Error::failed("the image of this disk is not open").at(path))
    }

    /// Returns the identity of the image at this path.
    ///
    /// # Errors
    /// Returns an error if the image is not held open.
    pub fn id(&self, path: &Path) -> Result<FileId> {
        Ok(self.find(path)?.id)
    }

    /// Returns the open file of the image at this path.
    ///
    /// # Errors
    /// Returns an error if the image is not held open.
    pub fn file(&self, path: &Path) -> Result<&File> {
        Ok(&self.find(path)?.file)
    }

    /// Returns a path by which other processes can open exactly this file while this process holds it open.
    ///
    /// # Errors
    /// Returns an error if the image is not held open.
    pub fn place(&self, path: &Path) -> Result<PathBuf> {
        Ok(format!("/proc/{}/fd/{}", std::process::id(), self.file(path)?.as_raw_fd()).into())
    }
}

/// Returns a path that reopens the file in this process, independent of its name.
pub(super) fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_a_replaced_file() {
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
