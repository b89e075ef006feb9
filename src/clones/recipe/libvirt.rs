//! VMs that libvirt started: libvirt passes a secret object that is usually unused, and hints must name elements of the
//! domain XML.

/// Secret objects of a VM.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<String>);

/// Changes to a domain XML, each with the words of the refusals that the change resolves.
const DOMAIN_CHANGES: [(&[&str], &str); 11] = [
    (&["balloon"], "<memballoon model='none'/>"),
    (&["mem-lock"], "no <locked/> in <memoryBacking>"),
    (&["-netdev"], "<interface type='user'/> for other interfaces"),
    (&["spice"], "<graphics type='vnc'/>, no channel and no audio of SPICE"),
    (&["qxl"], "<model type='virtio'/> in <video>"),
    (&["usb-redir"], "no <redirdev>"),
    (&["tpm"], "no <tpm>"),
    (&["9p", "vhost-user-fs", "a shared directory"], "no <filesystem>"),
    (&["vfio", "usb-host"], "no <hostdev>"),
    (&["hda", "AC97", "ES1370", "virtio-sound"], "no <sound>"),
    (&["a raw host disk", "is not a local file"], "<disk type='file'> for other disks"),
];

impl Secrets {
    pub fn add(&mut self, id: String) {
        self.0.push(id);
    }

    /// Describes the secrets that arguments of clones refer to; clones have no secrets.
    pub fn needed(&self, argv: &[String]) -> Vec<String> {
        let names = |word: &str, id: &str| word.split(['=', ',']).any(|part| part == id);
        let needed = |id: &String| {
            let word = argv.iter().find(|word| names(word, id))?;
            Some(format!("object secret ({id}), used by {word}"))
        };
        self.0.iter().filter_map(needed).collect()
    }

    /// Returns true if libvirt started the VM: libvirt passes a secret `masterKey0` to every VM.
    pub fn is_libvirt(&self) -> bool {
        self.0.iter().any(|id| id == "masterKey0")
    }

    /// Returns the advice for getting RAM into a shared file; `problems` are the changes to QEMU's command line.
    pub fn share_ram(&self, problems: &[String]) -> String {
        match self.is_libvirt() {
            true => "add <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking> to the \
                     libvirt <domain> and restart the VM"
                .to_owned(),
            false => format!(
                "restart the VM with these changes: {}; `stencil capture --check SOCK` prints the whole command line",
                problems.join("; ")
            ),
        }
    }

    /// Returns the advice for starting the VM without the refused options.
    pub fn start_without(&self, refused: &[String]) -> String {
        if !self.is_libvirt() {
            return "restart the VM without these options and devices, then capture again; `stencil capture \
                    --check SOCK` prints a supported command line"
                .to_owned();
        }
        let has = |words: &[&str]| words.iter().any(|word| refused.iter().any(|text| text.contains(word)));
        let changes = DOMAIN_CHANGES.iter().filter(|(words, _)| has(words)).map(|(_, change)| *change);
        let changes = match changes.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "without them".to_owned(),
            changes => format!("with {changes}"),
        };
        format!("restart the libvirt domain {changes}, then capture again")
    }
}
