//! Which file of a template is the guest's memory, and which file is its device state. No other module decides this.
//!
//! * The memory is the only file of kind ram, or the one with the name `memory` of several.
//! * The device state is the blob with the name `state`, or else the first blob that begins with the header of a
//!   Firecracker state file.

use crate::error::{Code, Result};
use crate::store::format::firecracker::FirecrackerState;
use crate::store::{BLOCK_SIZE, FileKind, Scratch, Template};
use crate::units::to_usize;

/// Names of the files that have a role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// The guest's memory; `None` for a template without RAM, or with several RAM files of which none is `memory`.
    pub memory: Option<String>,
    /// The device state.
    pub state: Option<String>,
}

impl Roles {
    /// Finds the files by name and kind. `head` returns the first bytes of the file with this index.
    ///
    /// # Errors
    /// Returns the errors of `head`.
    pub fn of<'a>(
        files: impl IntoIterator<Item = (&'a str, FileKind)>,
        mut head: impl FnMut(usize) -> Result<Vec<u8>>,
    ) -> Result<Roles> {
        let files: Vec<(usize, (&str, FileKind))> = files.into_iter().enumerate().collect();
        let of_kind = |kind| files.iter().filter(move |(_, file)| file.1 == kind);
        let named = |kind, name| of_kind(kind).find(move |(_, file)| file.0 == name);
        let memory = match of_kind(FileKind::Ram).count() {
            1 => of_kind(FileKind::Ram).next(),
            _ => named(FileKind::Ram, "memory"),
        };
        let mut state = named(FileKind::Blob, "state");
        if state.is_none() {
            for blob in of_kind(FileKind::Blob) {
                if FirecrackerState::header(&head(blob.0)?).is_ok() {
                    state = Some(blob);
                    break;
                }
            }
        }
        let name = |found: Option<&(usize, (&str, FileKind))>| found.map(|(_, file)| file.0.to_owned());
        Ok(Roles { memory: name(memory), state: name(state) })
    }
}

impl Template {
    /// Returns the names of the files that have a role. Reads the first block of blobs if none has the name `state`.
    ///
    /// # Errors
    /// Same as [`Template::read_block`].
    pub fn roles(&self) -> Result<Roles> {
        let files = self.files().iter().map(|file| (file.name.as_str(), file.kind));
        Roles::of(files, |file| match self.head(file) {
            // A damaged disk does not keep the memory from being used.
            Err(error) if error.code() == Code::Damage => Ok(vec![]),
            head => head,
        })
    }

    /// Returns the first block of a file, which is empty for an empty file.
    ///
    /// # Errors
    /// Same as [`Template::read_block`].
    pub fn head(&self, file: usize) -> Result<Vec<u8>> {
        if self.block_count(file) == 0 {
            return Ok(vec![]);
        }
        let mut head = vec![0; to_usize(BLOCK_SIZE)];
        let length = self.read_block(file, 0, &mut Scratch::default(), &mut head)?;
        head.truncate(length);
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FileKind::{Blob, Ram, Rom};

    #[test]
    fn finds_memory_and_state_under_any_names() {
        let firecracker = b"\0\0\0\x64\x86\x84\x19\x10\x07\x058.0.0";
        let roles = |files: &[(&'static str, FileKind, &[u8])]| {
            let roles =
                Roles::of(files.iter().map(|f| (f.0, f.1)), |file| Ok(files[file].2.to_vec())).unwrap();
            (roles.memory, roles.state)
        };
        let found = |memory: &str, state: &str| {
            let name = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
            (name(memory), name(state))
        };
        let qemu: &[u8] = b"QEVM";
        assert_eq!(roles(&[("memory", Ram, b""), ("state", Blob, qemu)]), found("memory", "state"));
        assert_eq!(roles(&[("a", Blob, qemu), ("b", Blob, firecracker), ("c", Ram, b"")]), found("c", "b"));
        assert_eq!(roles(&[("a", Blob, firecracker), ("state", Blob, qemu)]), found("", "state"));
        assert_eq!(roles(&[("memory", Ram, b""), ("memory-1", Ram, b"")]), found("memory", ""));
        assert_eq!(roles(&[("one", Ram, b""), ("two", Ram, b""), ("rom", Rom, firecracker)]), found("", ""));
    }
}
