//! Configuration that makes a VMM map a template's memory: a pure function of the template's files and recipe.

mod cloud_hypervisor;
mod firecracker;
mod kata;
mod libvirt;
mod paste;
mod qemu;
mod served;

use std::str::FromStr;

use crate::error::{Error, Result};
pub use cloud_hypervisor::{check_launch, clone_files as cloud_hypervisor_clone};
pub use paste::{VmmArguments, shell_word};
pub use served::Served;

/// Programs that can map guest memory from a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU, configured by its command line.
    Qemu,
    /// Firecracker, configured by the body of `PUT /snapshot/load`.
    Firecracker,
    /// Cloud Hypervisor, configured by the directory of a snapshot.
    CloudHypervisor,
    /// libvirt, configured by a domain with `<qemu:commandline>`.
    Libvirt,
    /// Kata Containers, configured by a script for `path` in `[hypervisor.qemu]`, or by a bind mount.
    Kata,
}

impl Vmm {
    /// All VMMs.
    pub const ALL: [Vmm; 5] = [Vmm::Qemu, Vmm::Firecracker, Vmm::CloudHypervisor, Vmm::Libvirt, Vmm::Kata];

    /// Returns the value of `--vmm`.
    pub fn name(self) -> &'static str {
        match self {
            Vmm::Qemu => "qemu",
            Vmm::Firecracker => "firecracker",
            Vmm::CloudHypervisor => "cloud-hypervisor",
            Vmm::Libvirt => "libvirt",
            Vmm::Kata => "kata",
        }
    }

    /// Returns the names of the template's files that the configuration is made from.
    pub fn documents(self) -> &'static [&'static str] {
        match self {
            Vmm::CloudHypervisor => &cloud_hypervisor::FILES,
            _ => &[],
        }
    }
}

impl FromStr for Vmm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Vmm> {
        Vmm::ALL.into_iter().find(|vmm| vmm.name() == text).ok_or_else(|| {
            Error::usage(format!("unknown VMM '{text}'"))
                .hint(format!("use one of {}", Vmm::ALL.map(Vmm::name).join(", ")))
        })
    }
}

/// Returns the configuration of a VMM for a template.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if the VMM cannot use the template.
pub fn paste(vmm: Vmm, template: &Served) -> Result<VmmArguments> {
    match vmm {
        Vmm::Qemu => qemu::paste(template),
        Vmm::Firecracker => firecracker::paste(template),
        Vmm::CloudHypervisor => cloud_hypervisor::paste(template),
        Vmm::Libvirt => libvirt::paste(template),
        Vmm::Kata => kata::paste(template),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::clones::recipe::Values;
    use crate::store::{FileKind, Roles, TemplateFile};
    use crate::units::Bytes;

    /// Creates a template with files of these kinds and sizes in MiB.
    pub(super) fn served(files: &[(&str, FileKind, u64)]) -> Served {
        let file = |&(name, kind, mib): &(&str, FileKind, u64)| {
            let size = Bytes::new(mib << 20);
            TemplateFile { name: name.into(), kind, size, data_bytes: size }
        };
        let files: Vec<_> = files.iter().map(file).collect();
        let path = |file: &TemplateFile| (file.name.clone(), format!("/mnt/by-id/abc/{}", file.name));
        let names = files.iter().map(|file| (file.name.as_str(), file.kind));
        let roles = Roles::of(names, |_| Ok(vec![])).unwrap();
        let values = Values::new("web:1", &files.iter().map(path).collect::<Vec<_>>(), &roles);
        Served {
            name: "web:1".into(),
            files,
            roles,
            values,
            recipe: None,
            state_head: None,
            commits_strictly: false,
            documents: BTreeMap::new(),
            clone_dir: None,
        }
    }

    #[test]
    fn refuses_unaligned_ram_size() {
        let mut template = served(&[("memory", FileKind::Ram, 2), ("memory-1", FileKind::Ram, 2)]);
        template.files[1].size = Bytes::new((2 << 20) + 4096);
        let error = paste(Vmm::Qemu, &template).unwrap_err().to_string();
        assert!(error.contains("'memory-1'") && error.contains("2101248 bytes"), "{error}");
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
