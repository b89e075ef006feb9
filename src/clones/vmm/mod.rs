//! What to paste so that a VMM's guest has a template's memory: purely, from the template's files and recipe.

mod firecracker;
mod kata;
mod libvirt;
mod qemu;

use std::str::FromStr;

use super::recipe::Recipe;
use crate::error::{Error, Result};
use crate::store::{FileKind, TemplateFile};
use crate::units::Bytes;

/// Programs that take guest memory from a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// Its command line.
    Qemu,
    /// The body of its snapshot/load call.
    Firecracker,
    /// A domain with `<qemu:commandline>`.
    Libvirt,
    /// A script for `path` of `[hypervisor.qemu]`.
    Kata,
}

impl Vmm {
    /// The word on the command line.
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
        [Vmm::Qemu, Vmm::Firecracker, Vmm::Libvirt, Vmm::Kata]
            .into_iter()
            .find(|vmm| vmm.name() == text)
            .ok_or_else(|| {
                Error::usage(format!("'{text}' is no VMM that is known here"))
                    .remedy("use qemu, firecracker, libvirt or kata")
            })
    }
}

/// A template as a mount shows it.
#[derive(Debug, Clone)]
pub struct Served {
    /// As it was asked for.
    pub name: String,
    /// Its files, each with its path below the mount.
    pub files: Vec<(TemplateFile, String)>,
    /// How its clones are launched, where it was captured.
    pub recipe: Option<Recipe>,
    /// First bytes of its device state.
    pub state_head: Option<Vec<u8>>,
}

/// What to paste.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paste {
    /// The text.
    pub text: String,
    /// For QEMU: the command line in words, the program first.
    pub argv: Option<Vec<String>>,
    /// For Firecracker: the same as a JSON value.
    pub body: Option<serde_json::Value>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// What to paste for that VMM.
///
/// # Errors
/// A usage error that names what stands against it.
pub fn paste(vmm: Vmm, template: &Served) -> Result<Paste> {
    match vmm {
        Vmm::Qemu => qemu::paste(template),
        Vmm::Firecracker => firecracker::paste(template),
        Vmm::Libvirt => libvirt::paste(template),
        Vmm::Kata => kata::paste(template),
    }
}

/// A file with its path.
#[derive(Debug, Clone, Copy)]
struct Memory<'a> {
    size: Bytes,
    path: &'a str,
}

impl Served {
    /// RAM files; `memory` is the first.
    fn ram(&self) -> Result<Vec<Memory<'_>>> {
        let mut ram = self.of_kind(FileKind::Ram);
        ram.sort_by_key(|(name, _)| *name != "memory");
        if ram.is_empty() {
            return Err(Error::usage(format!("template {} has no RAM, only {}", self.name, self.names()))
                .remedy("name a template that was captured, or imported with a memory file"));
        }
        Ok(ram.into_iter().map(|(_, memory)| memory).collect())
    }

    /// Its only RAM file.
    fn one_ram(&self, who: &str, why: &str) -> Result<Memory<'_>> {
        match self.ram()?.as_slice() {
            [ram] => Ok(*ram),
            several => Err(Error::usage(format!(
                "template {} has {} RAM files, and {who} {why}",
                self.name,
                several.len()
            ))
            .remedy("use --vmm qemu, which gives each file a NUMA node")),
        }
    }

    fn roms(&self) -> Vec<Memory<'_>> {
        self.of_kind(FileKind::Rom).into_iter().map(|(_, memory)| memory).collect()
    }

    fn of_kind(&self, kind: FileKind) -> Vec<(&str, Memory<'_>)> {
        let files = self.files.iter().filter(|(file, _)| file.kind == kind);
        files.map(|(file, path)| (file.name.as_str(), Memory { size: file.size, path })).collect()
    }

    fn state(&self) -> Option<&str> {
        self.files.iter().find(|(file, _)| file.name == "state").map(|(_, path)| path.as_str())
    }

    fn names(&self) -> String {
        self.files.iter().map(|(file, _)| file.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// A word as a shell reads it back.
fn shell_word(word: &str) -> String {
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

    /// A template with files of these kinds and sizes in MiB.
    pub(super) fn served(files: &[(&str, FileKind, u64)]) -> Served {
        let file = |&(name, kind, mib): &(&str, FileKind, u64)| {
            let size = Bytes::new(mib << 20);
            let file = TemplateFile { name: name.into(), kind, size, data_bytes: size };
            (file, format!("/mnt/by-id/abc/{name}"))
        };
        let files = files.iter().map(file).collect();
        Served { name: "web:1".into(), files, recipe: None, state_head: None }
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word("-m"), "-m");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn a_template_without_ram_is_refused_everywhere() {
        let none = served(&[("rom", FileKind::Rom, 4)]);
        for vmm in [Vmm::Qemu, Vmm::Firecracker, Vmm::Libvirt, Vmm::Kata] {
            let error = paste(vmm, &none).unwrap_err();
            assert!(error.to_string().contains("has no RAM"), "{error}");
        }
        assert!("xen".parse::<Vmm>().is_err());
    }
}
