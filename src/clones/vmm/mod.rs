//! Configuration that makes a VMM map a template's memory: a pure function of the template's files and recipe.

mod firecracker;
mod kata;
mod libvirt;
mod qemu;

use std::str::FromStr;

use super::recipe::{Recipe, Values};
use crate::error::{Error, Result};
use crate::store::{FileKind, TemplateFile};
use crate::units::Bytes;

/// Programs that can map guest memory from a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, configured by its command line.
    Qemu,
    /// Firecracker, configured by the body of `PUT /snapshot/load`.
    Firecracker,
    /// libvirt, configured by a domain with `<qemu:commandline>`.
    Libvirt,
    /// Kata Containers, configured by a script for `path` in `[hypervisor.qemu]`.
    Kata,
}

impl Vmm {
    /// All VMMs.
    pub const ALL: [Vmm; 4] = [Vmm::Qemu, Vmm::Firecracker, Vmm::Libvirt, Vmm::Kata];

    /// Returns the value of `--vmm`.
    pub fn name(self) -> &'static str {
        match self {
            Vmm::Qemu => "qemu",
            Vmm::Firecracker => "firecracker",
            Vmm::Libvirt => "libvirt",
            Vmm::Kata => "kata",
        }
    }
}

impl FromStr for Vmm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Vmm> {
        Vmm::ALL.into_iter().find(|vmm| vmm.name() == text).ok_or_else(|| {
            Error::usage(format!("unknown VMM '{text}'"))
                .remedy(format!("use one of {}", Vmm::ALL.map(Vmm::name).join(", ")))
        })
    }
}

/// A template as a mount serves it.
#[derive(Debug, Clone)]
pub struct Served {
    /// The tag or digest that the user gave.
    pub name: String,
    /// Files of the template.
    pub files: Vec<TemplateFile>,
    /// Paths of the files below the mount, as placeholder values.
    pub values: Values,
    /// The launch recipe; `None` if the template was not captured.
    pub recipe: Option<Recipe>,
    /// First bytes of the device state.
    pub state_head: Option<Vec<u8>>,
}

/// The configuration of a VMM, for the user to paste.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paste {
    /// The configuration as text.
    pub text: String,
    /// For QEMU: the command line as separate words, beginning with the program.
    pub argv: Option<Vec<String>>,
    /// For Firecracker: the request body as a JSON value.
    pub body: Option<serde_json::Value>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Returns the configuration of a VMM for a template.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if the VMM cannot use the template.
pub fn paste(vmm: Vmm, template: &Served) -> Result<Paste> {
    match vmm {
        Vmm::Qemu => qemu::paste(template),
        Vmm::Firecracker => firecracker::paste(template),
        Vmm::Libvirt => libvirt::paste(template),
        Vmm::Kata => kata::paste(template),
    }
}

/// A memory file with its path.
#[derive(Debug, Clone, Copy)]
struct Memory<'a> {
    name: &'a str,
    size: Bytes,
    path: &'a str,
}

impl Served {
    /// Returns the RAM files: `memory` first, then the others in natural order of their names (`2` before `10`).
    fn ram(&self) -> Result<Vec<Memory<'_>>> {
        let mut ram = self.of_kind(FileKind::Ram);
        ram.sort_by_key(|memory| (memory.name != "memory", natural_order(memory.name), memory.name));
        if ram.is_empty() {
            return Err(Error::usage(format!(
                "template {} has no RAM file, only {}",
                self.name,
                self.names()
            ))
            .remedy("choose a template that was captured, or imported with a memory file"));
        }
        if let Some(unaligned) = ram.iter().find(|memory| !memory.size.get().is_multiple_of(RAM_STEP)) {
            return Err(Error::usage(format!(
                "RAM file '{}' of template {} has {} bytes, expected a multiple of {RAM_STEP}",
                unaligned.name,
                self.name,
                unaligned.size.get()
            ))
            .remedy(format!(
                "pad the source with zeros (truncate -s %{RAM_STEP} FILE) and import it again"
            )));
        }
        Ok(ram)
    }

    /// Returns the only RAM file; `reason` says why the VMM cannot use several.
    fn one_ram(&self, reason: &str) -> Result<Memory<'_>> {
        match self.ram()?.as_slice() {
            [ram] => Ok(*ram),
            several => {
                Err(Error::usage(format!("template {} has {} RAM files: {reason}", self.name, several.len()))
                    .remedy("use --vmm qemu, which maps each file as a NUMA node"))
            }
        }
    }

    fn roms(&self) -> Vec<Memory<'_>> {
        self.of_kind(FileKind::Rom)
    }

    fn of_kind(&self, kind: FileKind) -> Vec<Memory<'_>> {
        let files = self.files.iter().filter(|file| file.kind == kind);
        files.map(|file| Memory { name: &file.name, size: file.size, path: self.path(&file.name) }).collect()
    }

    fn path(&self, file: &str) -> &str {
        self.values.get(&format!("file:{file}")).unwrap_or_default()
    }

    /// Returns the path of the device state.
    fn state(&self) -> Option<&str> {
        self.files.iter().any(|file| file.name == "state").then(|| self.path("state"))
    }

    fn names(&self) -> String {
        self.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>().join(", ")
    }
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

/// Quotes a word for a POSIX shell.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    /// Creates a template with files of these kinds and sizes in MiB.
    pub(super) fn served(files: &[(&str, FileKind, u64)]) -> Served {
        let file = |&(name, kind, mib): &(&str, FileKind, u64)| {
            let size = Bytes::new(mib << 20);
            TemplateFile { name: name.into(), kind, size, data_bytes: size }
        };
        let files: Vec<_> = files.iter().map(file).collect();
        let path = |file: &TemplateFile| (file.name.clone(), format!("/mnt/by-id/abc/{}", file.name));
        let values = Values::new("web:1", &files.iter().map(path).collect::<Vec<_>>());
        Served { name: "web:1".into(), files, values, recipe: None, state_head: None }
    }

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

    #[test]
    fn refuses_unaligned_ram_size() {
        let mut template = served(&[("memory", FileKind::Ram, 2), ("memory-1", FileKind::Ram, 2)]);
        template.files[1].size = Bytes::new((2 << 20) + 4096);
        let error = paste(Vmm::Qemu, &template).unwrap_err().to_string();
        assert!(error.contains("'memory-1'") && error.contains("2101248 bytes"), "{error}");
    }

    #[test]
    fn quotes_words_for_a_shell() {
        assert_eq!(shell_word("-m"), "-m");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn every_vmm_refuses_a_template_without_ram() {
        let none = served(&[("rom", FileKind::Rom, 4)]);
        for vmm in Vmm::ALL {
            let error = paste(vmm, &none).unwrap_err();
            assert!(error.to_string().contains("has no RAM file"), "{error}");
        }
        assert!("xen".parse::<Vmm>().is_err());
    }
}
