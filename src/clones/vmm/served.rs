//! A template as a mount serves it, with its memory files in order.

use std::collections::BTreeMap;

use crate::clones::recipe::{Recipe, Values};
use crate::error::{Error, Result};
use crate::store::{BLOCK_SIZE, FileKind, FirecrackerState, Roles, Scratch, Template, TemplateFile};
use crate::units::{Bytes, to_usize};

/// A template as a mount serves it.
#[derive(Debug, Clone)]
pub struct Served {
    /// The tag or digest that the user gave.
    pub name: String,
    /// Files of the template.
    pub files: Vec<TemplateFile>,
    /// Which files are memory and state.
    pub roles: Roles,
    /// Paths of the files below the mount, as placeholder values.
    pub values: Values,
    /// The launch recipe; `None` if the template was not captured.
    pub recipe: Option<Recipe>,
    /// First bytes of the device state.
    pub state_head: Option<Vec<u8>>,
    /// True if the host commits memory strictly (`vm.overcommit_memory=2`): QEMU then rejects `reserve=off`.
    pub commits_strictly: bool,
    /// Contents of the files that the configuration is made from, by name; see
    /// [`Vmm::documents`](super::Vmm::documents).
    pub documents: BTreeMap<String, Vec<u8>>,
    /// Absolute path of the directory for the files of one clone.
    pub clone_dir: Option<String>,
}

/// A memory file with its path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory<'a> {
    pub name: &'a str,
    pub size: Bytes,
    pub path: &'a str,
}

impl Served {
    /// Returns the RAM files: the memory of the template first, then the others in natural order of their names (`2`
    /// before `10`).
    pub(super) fn ram(&self) -> Result<Vec<Memory<'_>>> {
        let mut ram = self.of_kind(FileKind::Ram);
        ram.sort_by_key(|memory| {
            (Some(memory.name) != self.roles.memory.as_deref(), natural_order(memory.name), memory.name)
        });
        if ram.is_empty() {
            return Err(Error::usage(format!(
                "template {} has no RAM file, only {}",
                self.name,
                self.names()
            ))
            .hint("choose a template that was captured, or imported with a memory file"));
        }
        if let Some(unaligned) = ram.iter().find(|memory| !memory.size.get().is_multiple_of(RAM_STEP)) {
            return Err(Error::usage(format!(
                "RAM file '{}' of template {} has {} bytes, expected a multiple of {RAM_STEP}",
                unaligned.name,
                self.name,
                unaligned.size.get()
            ))
            .hint(format!(
                "pad the source with zeros (truncate -s %{RAM_STEP} FILE) and import the source again"
            )));
        }
        Ok(ram)
    }

    /// Returns the only RAM file; `reason` says why the VMM cannot use several.
    pub(super) fn one_ram(&self, reason: &str) -> Result<Memory<'_>> {
        match self.ram()?.as_slice() {
            [ram] => Ok(*ram),
            several => {
                Err(Error::usage(format!("template {} has {} RAM files: {reason}", self.name, several.len()))
                    .hint("use --vmm qemu, which maps each file as a NUMA node"))
            }
        }
    }

    pub(super) fn roms(&self) -> Vec<Memory<'_>> {
        self.of_kind(FileKind::Rom)
    }

    fn of_kind(&self, kind: FileKind) -> Vec<Memory<'_>> {
        let files = self.files.iter().filter(|file| file.kind == kind);
        files.map(|file| Memory { name: &file.name, size: file.size, path: self.path(&file.name) }).collect()
    }

    pub(super) fn path(&self, file: &str) -> &str {
        self.values.get(&format!("file:{file}")).unwrap_or_default()
    }

    /// Returns the path of the device state.
    pub(super) fn state(&self) -> Option<&str> {
        self.roles.state.as_deref().map(|name| self.path(name))
    }

    /// Reads the files that a configuration is made from; see [`Vmm::documents`](super::Vmm::documents).
    ///
    /// # Errors
    /// Returns an error if a file of the template cannot be read.
    pub fn read_documents(&mut self, template: &Template, names: &[&str]) -> Result<()> {
        for name in names {
            if let Some(bytes) = read(template, name, MAX_DOCUMENT)? {
                self.documents.insert((*name).to_owned(), bytes);
            }
        }
        Ok(())
    }

    /// Returns true if the device state is Firecracker's.
    pub fn is_of_firecracker(&self) -> bool {
        self.state_head.as_deref().is_some_and(|head| FirecrackerState::header(head).is_ok())
    }

    /// Returns true if the template has files with all of these names.
    pub fn has_files(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.files.iter().any(|file| file.name == *name))
    }

    pub(super) fn names(&self) -> String {
        self.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// Largest length in bytes of a file that a configuration is made from.
const MAX_DOCUMENT: u64 = 64 << 20;

/// Returns the first `limit` bytes of a file; `None` if the template has no such file.
fn read(template: &Template, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let Some(file) = template.file(name) else { return Ok(None) };
    let (mut bytes, mut scratch) = (vec![], Scratch::default());
    for block in 0..template.block_count(file).min(limit.div_ceil(BLOCK_SIZE)) {
        let start = bytes.len();
        bytes.resize(start + to_usize(BLOCK_SIZE), 0);
        let length = template.read_block(file, block, &mut scratch, &mut bytes[start..])?;
        bytes.truncate(start + length);
    }
    Ok(Some(bytes))
}

/// Granularity of RAM sizes in bytes: QEMU rounds the size of `-m` up to a multiple, and refuses memory of another
/// size.
const RAM_STEP: u64 = 8192;

/// Returns the sort key of a name in natural order: runs of digits compare as numbers.
fn natural_order(name: &str) -> Vec<(usize, &str)> {
    let mut parts = vec![];
    let mut rest = name;
    while let Some(first) = rest.chars().next() {
        let is_number = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != is_number).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        // Without leading zeros the longer number is the greater one. Text sorts after numbers.
        let part = if is_number { part.trim_start_matches('0') } else { part };
        parts.push((if is_number { part.len() } else { usize::MAX }, part));
        rest = after;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;

    #[test]
    fn sorts_names_in_natural_order() {
        let mut names = ["memory-10", "memory-n", "memory-2", "memory-002b", "memory-1", "memory"];
        names.sort_by_key(|name| natural_order(name));
        assert_eq!(names, ["memory", "memory-1", "memory-2", "memory-002b", "memory-10", "memory-n"]);
        let files: Vec<_> = (1..=12).rev().map(|n| format!("memory-{n}")).chain(["memory".into()]).collect();
        let files: Vec<_> = files.iter().map(|name| (name.as_str(), FileKind::Ram, 2)).collect();
        let served = served(&files);
        let order: Vec<_> = served.ram().unwrap().iter().map(|memory| memory.name.to_owned()).collect();
        assert_eq!(order[..3], ["memory", "memory-1", "memory-2"]);
        assert_eq!(order[10..], ["memory-10", "memory-11", "memory-12"]);
    }
}
