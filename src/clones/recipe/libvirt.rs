//! A VM that libvirt started: it has a secret that nothing uses, and its user writes XML, so that is what a remedy says.

/// Secret objects of a VM.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<String>);

/// What a domain should have, or be without, so that its QEMU is without something. The first words are QEMU's.
const INSTEAD: [(&[&str], &str); 11] = [
    (&["balloon"], "<memballoon model='none'/>"),
    (&["mem-lock"], "no <locked/> in <memoryBacking>"),
    (&["-netdev"], "<interface type='user'/> for other interfaces"),
    (&["spice"], "<graphics type='vnc'/>, no channel and no audio of SPICE"),
    (&["qxl"], "<model type='virtio'/> in <video>"),
    (&["usb-redir"], "no <redirdev>"),
    (&["tpm"], "no <tpm>"),
    (&["9p", "vhost-user-fs", "a shared folder"], "no <filesystem>"),
    (&["vfio", "usb-host"], "no <hostdev>"),
    (&["hda", "AC97", "ES1370", "virtio-sound"], "no <sound>"),
    (&["a raw disk of the host", "is no file of this host"], "<disk type='file'> for other disks"),
];

impl Secrets {
    pub fn add(&mut self, id: String) {
        self.0.push(id);
    }

    /// Those that an argument of clones names, which have none.
    pub fn needed(&self, argv: &[String]) -> Vec<String> {
        let names = |word: &str, id: &str| word.split(['=', ',']).any(|part| part == id);
        let needed = |id: &String| {
            let word = argv.iter().find(|word| names(word, id))?;
            Some(format!("object secret ({id}), which {word} names"))
        };
        self.0.iter().filter_map(needed).collect()
    }

    /// libvirt gives one to each of its VMs.
    pub fn is_libvirt(&self) -> bool {
        self.0.iter().any(|id| id == "masterKey0")
    }

    /// What to do so that RAM is in a file; `problems` is what QEMU's command line should have.
    pub fn share_ram(&self, problems: &[String]) -> String {
        match self.is_libvirt() {
            true => "libvirt started it: put <memoryBacking><source type='file'/><access mode='shared'/>\
                     </memoryBacking> into its <domain>, and start it anew"
                .to_owned(),
            false => format!(
                "start it anew: {}; `stencil capture --check SOCK` prints the whole command line",
                problems.join("; ")
            ),
        }
    }

    /// What to do so that the VM is without these.
    pub fn start_without(&self, refused: &[String]) -> String {
        if !self.is_libvirt() {
            return "start the VM without it, then capture again; `stencil capture --check SOCK` prints such a command line"
                .to_owned();
        }
        let has = |words: &[&str]| words.iter().any(|word| refused.iter().any(|one| one.contains(word)));
        let changes = INSTEAD.iter().filter(|(words, _)| has(words)).map(|(_, change)| *change);
        let changes = match changes.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "without it".to_owned(),
            changes => format!("with {changes}"),
        };
        format!("libvirt started the VM: start its domain anew {changes}, then capture again")
    }
}
