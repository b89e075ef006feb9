//! The command line of a running QEMU → the command line of its clones: purely, from its words alone.
//!
//! What is not known to be safe once per clone is refused by name: two clones must never write to one
//! disk, answer to one network address or share one socket.

use std::path::PathBuf;

use super::memory::{self, Memory, Problem};
use super::props::Props;
use super::rules::{Rule, is_device_for_clones, rule};
use crate::error::{Error, Result};

/// What the command line does not say.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The machine type without alias (`pc-q35-10.0`), so that a newer QEMU resumes it too.
    pub machine_type: Option<String>,
}

/// A RAM backend of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram {
    /// Its object id.
    pub id: String,
    /// Its file in the template: `memory`, further ones `memory-ID`.
    pub file: String,
    /// Where QEMU keeps it.
    pub mem_path: String,
}

/// Memory of the VM that nobody writes: the file of a read-only NVDIMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rom {
    /// Its object id.
    pub id: String,
    /// Its file in the template: `rom-ID`.
    pub file: String,
    /// Where QEMU keeps it.
    pub mem_path: String,
}

/// A file that clones need besides RAM and device state, kept in the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name in the template.
    pub file: String,
    /// Where it is, as the command line says.
    pub path: PathBuf,
}

/// The command line of clones, and what the template needs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Arguments with placeholders.
    pub argv: Vec<String>,
    /// RAM backends, at least one.
    pub ram: Vec<Ram>,
    /// Memory that is only read.
    pub roms: Vec<Rom>,
    /// Further files.
    pub blobs: Vec<Blob>,
    /// Devices named on the command line.
    pub devices: usize,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Works out the command line of clones from the one of a running VM, without its program.
///
/// # Errors
/// A usage error that names everything that clones cannot have, or the text to add for RAM in a shared file.
pub fn plan(argv: &[String], facts: &Facts) -> Result<Plan> {
    let mut work = Work::new(facts);
    let mut words = argv.iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)) else {
            work.refuse(format!("'{word}', a disk"));
            continue;
        };
        let mut value = || {
            words
                .next()
                .map(String::as_str)
                .ok_or_else(|| Error::failed(format!("QEMU's own command line ends after {word}")))
        };
        match rule(option) {
            Rule::Keep(false) => work.keep(option, None),
            Rule::Keep(true) => {
                let value = value()?;
                work.note_kept(option, value);
                work.keep(option, Some(value));
            }
            Rule::Drop(false) => {}
            Rule::Drop(true) => drop(value()?),
            Rule::Machine => work.machine(value()?),
            Rule::Object => work.object(value()?),
            Rule::Device => work.device(value()?),
            Rule::Chardev => work.chardev(value()?),
            Rule::Serial => work.serial(value()?),
            Rule::Mon => work.mon(value()?),
            Rule::File => work.file(option, value()?),
            Rule::Refuse(what) => {
                let value = value()?;
                if matches!(option, "net" | "nic") && value == "none" {
                    work.no_network = true;
                    work.keep(option, Some(value));
                } else {
                    work.refuse(format!("-{option} {value}: {what}"));
                }
            }
            Rule::Unknown => work.refuse(format!("-{option}, which is not known to be safe for clones")),
        }
    }
    work.finish()
}

struct Work<'a> {
    facts: &'a Facts,
    argv: Vec<String>,
    ram: Vec<Ram>,
    roms: Vec<Rom>,
    blobs: Vec<Blob>,
    chardevs: Vec<(String, bool)>,
    monitors: Vec<String>,
    serials: usize,
    serial_given: bool,
    devices: Vec<String>,
    refused: Vec<String>,
    ram_problems: Vec<String>,
    no_network: bool,
    nodefaults: bool,
    machine_given: bool,
    machine: String,
    size: String,
    prealloc: bool,
}

impl<'a> Work<'a> {
    fn new(facts: &'a Facts) -> Self {
        Work {
            facts,
            argv: vec![],
            ram: vec![],
            roms: vec![],
            blobs: vec![],
            chardevs: vec![],
            monitors: vec![],
            serials: 0,
            serial_given: false,
            devices: vec![],
            refused: vec![],
            ram_problems: vec![],
            no_network: false,
            nodefaults: false,
            machine_given: false,
            machine: String::new(),
            size: String::from("128M"),
            prealloc: false,
        }
    }

    fn keep(&mut self, option: &str, value: Option<&str>) {
        self.nodefaults |= option == "nodefaults";
        self.argv.push(format!("-{option}"));
        self.argv.extend(value.map(str::to_owned));
    }

    fn refuse(&mut self, what: String) {
        self.refused.push(what);
    }

    fn note_kept(&mut self, option: &str, value: &str) {
        if option == "m" {
            let size = Props::parse(value, "size");
            size.as_ref().and_then(|p| p.get("size")).unwrap_or(value).clone_into(&mut self.size);
        }
    }

    fn props(&mut self, option: &str, text: &str, implied: &str) -> Option<Props> {
        let props = Props::parse(text, implied);
        match &props {
            Some(props) if !props.has_braces() => {}
            _ => self.refuse(format!("-{option} {text}, which cannot be taken apart")),
        }
        props
    }

    fn machine(&mut self, text: &str) {
        let Some(mut props) = self.props("machine", text, "type") else { return };
        if let (Some(pinned), Some(_)) = (&self.facts.machine_type, props.get("type")) {
            props.set("type", pinned);
        }
        if let Some(kind) = props.get("type") {
            kind.clone_into(&mut self.machine);
        }
        for key in ["pflash0", "pflash1", "memory-encryption", "confidential-guest-support"] {
            if let Some(value) = props.get(key) {
                self.refuse(format!("-machine {key}={value}"));
            }
        }
        self.machine_given = true;
        props.lead_with("type");
        self.keep("machine", Some(&props.render("type")));
    }

    fn object(&mut self, text: &str) {
        let Some(mut props) = self.props("object", text, "qom-type") else { return };
        props.lead_with("qom-type");
        let kind = props.get("qom-type").unwrap_or_default().to_owned();
        let id = props.get("id").unwrap_or_default().to_owned();
        match kind.as_str() {
            "rng-random" | "rng-builtin" | "iothread" => self.keep("object", Some(&props.render("qom-type"))),
            _ if memory::is_memory(&kind) => {
                let prealloc = memory::is_on(props.get("prealloc"));
                match memory::object(&mut props, self.ram.len(), &self.size) {
                    Ok(Memory::Ram(ram)) => {
                        self.prealloc |= prealloc;
                        self.ram.push(ram);
                    }
                    Ok(Memory::Rom(rom)) => self.roms.push(rom),
                    Err(Problem(text)) => return self.ram_problems.push(text),
                }
                self.keep("object", Some(&props.render("qom-type")));
            }
            _ => self.refuse(format!("object {kind} ({id})")),
        }
    }

    fn device(&mut self, text: &str) {
        let Some(mut props) = self.props("device", text, "driver") else { return };
        props.lead_with("driver");
        let driver = props.get("driver").unwrap_or_default().to_owned();
        if !is_device_for_clones(&driver) {
            let id = props.get("id").map(|id| format!(" ({id})")).unwrap_or_default();
            return self.refuse(format!("device {driver}{id}"));
        }
        if driver == "nvdimm"
            && let Some(against) = memory::nvdimm(&props, &self.roms)
        {
            return self.refuse(against);
        }
        if driver == "vmgenid" {
            props.set("guid", "auto");
        }
        if let Some(chardev) = props.get("chardev") {
            self.use_chardev(chardev);
        }
        self.devices.push(driver);
        self.keep("device", Some(&props.render("driver")));
    }

    fn use_chardev(&mut self, id: &str) {
        match self.chardevs.iter_mut().find(|(known, _)| known == id) {
            Some((_, used)) => *used = true,
            None => self.chardevs.push((id.to_owned(), true)),
        }
    }

    fn chardev(&mut self, text: &str) {
        let Some(props) = self.props("chardev", text, "backend") else { return };
        let id = props.get("id").unwrap_or_default();
        if !self.chardevs.iter().any(|(known, _)| known == id) {
            self.chardevs.push((id.to_owned(), false));
        }
    }

    fn mon(&mut self, text: &str) {
        let Some(props) = self.props("mon", text, "chardev") else { return };
        self.monitors.extend(props.get("chardev").map(str::to_owned));
    }

    fn serial(&mut self, value: &str) {
        self.serial_given = true;
        match value.strip_prefix("chardev:") {
            Some(id) => {
                self.use_chardev(id);
                self.keep("serial", Some(value));
            }
            None if value == "none" => self.keep("serial", Some(value)),
            None => self.add_serial(),
        }
    }

    fn add_serial(&mut self) {
        let name = match self.serials {
            0 => "serial.log".to_owned(),
            number => format!("serial-{number}.log"),
        };
        self.serials += 1;
        self.keep("serial", Some(&format!("file:{{dir}}/{name}")));
    }

    fn file(&mut self, option: &str, value: &str) {
        self.blobs.push(Blob { file: option.to_owned(), path: PathBuf::from(value) });
        self.keep(option, Some(&format!("{{file:{option}}}")));
    }

    fn finish(mut self) -> Result<Plan> {
        if self.ram.is_empty() && self.ram_problems.is_empty() {
            let machine = if self.machine.is_empty() { "q35" } else { self.machine.as_str() };
            self.ram_problems.push(format!(
                "add -machine {machine},memory-backend=ram0 -object memory-backend-file,id=ram0,size={},mem-path=FILE,share=on",
                self.size
            ));
        }
        if !self.ram_problems.is_empty() {
            return Err(Error::usage("the RAM of this VM is not in a file that QEMU shares")
                .remedy(format!("start it anew: {}", self.ram_problems.join("; "))));
        }
        if !self.nodefaults && !self.no_network {
            self.refuse("the default network card (start QEMU with -nic none)".into());
        }
        if !self.refused.is_empty() {
            return Err(Error::usage(format!("clones cannot have: {}", self.refused.join("; "))).remedy(
                "start the VM without it, then capture again; guests without disk and network can be cloned",
            ));
        }
        if !self.serial_given && !self.nodefaults {
            self.add_serial();
        }
        for (id, used) in std::mem::take(&mut self.chardevs) {
            if used && !self.monitors.contains(&id) {
                self.keep("chardev", Some(&format!("file,id={id},path={{dir}}/chardev-{id}.log")));
            }
        }
        if !self.machine_given
            && let Some(pinned) = &self.facts.machine_type
        {
            let pinned = pinned.clone();
            self.keep("machine", Some(&pinned));
        }
        for (option, value) in [
            ("name", "stencil-{id}"),
            ("display", "none"),
            ("parallel", "none"),
            ("monitor", "none"),
            ("chardev", "socket,id=stencil-qmp,path={dir}/qmp.sock,server=on,wait=off"),
            ("mon", "chardev=stencil-qmp,mode=control"),
            ("incoming", "defer"),
        ] {
            self.keep(option, Some(value));
        }
        let warnings = self.warnings();
        Ok(Plan {
            argv: self.argv,
            ram: self.ram,
            roms: self.roms,
            blobs: self.blobs,
            devices: self.devices.len(),
            warnings,
        })
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        if !self.devices.iter().any(|d| d == "vmgenid") {
            warnings.push(
                "the VM has no vmgenid: its clones cannot see that they are copies; start it with -device vmgenid,guid=auto"
                    .to_owned(),
            );
        }
        if !self.devices.iter().any(|d| d.starts_with("virtio-rng")) {
            warnings.push(
                "the VM has no virtio-rng: its clones draw random numbers from one state; start it with \
                 -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0"
                    .to_owned(),
            );
        }
        if self.prealloc {
            warnings
                .push("prealloc is left out for clones: it would copy every page of the template".to_owned());
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: &str = "-M q35,memory-backend=ram0 -accel tcg -m 256M -nodefaults -display none -serial file:/tmp/s \
        -object memory-backend-file,id=ram0,size=256M,mem-path=/tmp/ram,share=on,prealloc=on \
        -qmp unix:/tmp/q,server=on,wait=off -device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 \
        -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
        -kernel /boot/k -initrd /boot/i -append console=ttyS0 -daemonize -pidfile /tmp/p";

    fn words(text: &str) -> Vec<String> {
        text.split_ascii_whitespace().map(str::to_owned).collect()
    }

    fn planned(extra: &str) -> Result<Plan> {
        let facts = Facts { machine_type: Some("pc-q35-10.0".into()) };
        plan(&words(&format!("{GUEST} {extra}")), &facts)
    }

    #[test]
    fn a_plain_guest_gets_a_recipe() {
        let plan = planned("").unwrap();
        let line = plan.argv.join(" ");
        assert!(line.starts_with("-machine pc-q35-10.0,memory-backend=ram0 -accel tcg -m 256M"), "{line}");
        assert!(line.contains(
            "-object memory-backend-file,id=ram0,size=256M,mem-path={memory},share=off,readonly=on,rom=off "
        ));
        assert!(line.contains("-device vmgenid,guid=auto"));
        assert!(line.contains("-serial file:{dir}/serial.log"));
        assert!(line.contains("-kernel {file:kernel} -initrd {file:initrd}"));
        assert!(line.ends_with("-mon chardev=stencil-qmp,mode=control -incoming defer"));
        for gone in ["/tmp/", "daemonize", "pidfile", " -qmp ", "324e"] {
            assert!(!line.contains(gone), "{gone} in {line}");
        }
        assert_eq!(plan.ram, [Ram { id: "ram0".into(), file: "memory".into(), mem_path: "/tmp/ram".into() }]);
        assert_eq!(plan.blobs.len(), 2);
        assert_eq!(plan.warnings.len(), 1, "{:?}", plan.warnings);
    }

    #[test]
    fn what_clones_cannot_have_is_refused_by_name() {
        for (extra, name) in [
            ("-drive file=/d.img", "-drive file=/d.img: a disk"),
            ("/d.img", "'/d.img', a disk"),
            ("-netdev user,id=n0 -device virtio-net-pci,netdev=n0,id=eth", "device virtio-net-pci (eth)"),
            ("-device {\"driver\":\"vfio-pci\",\"host\":\"0:1\"}", "device vfio-pci"),
            ("-object tls-creds-psk,id=t", "object tls-creds-psk (t)"),
            ("-machine pflash0=f", "-machine pflash0=f"),
            ("-frobnicate", "-frobnicate"),
        ] {
            let error = planned(extra).unwrap_err();
            assert!(error.to_string().contains(name), "{extra}: {error}");
        }
        let no_nodefaults = words(&GUEST.replace("-nodefaults", ""));
        let error = plan(&no_nodefaults, &Facts::default()).unwrap_err();
        assert!(error.to_string().contains("-nic none"), "{error}");
    }

    #[test]
    fn ram_elsewhere_is_refused_with_the_text_to_add() {
        for (line, text) in [
            (
                "-M q35 -m 512M -nodefaults",
                "-machine q35,memory-backend=ram0 -object memory-backend-file,id=ram0,size=512M,mem-path=FILE,share=on",
            ),
            (
                "-object memory-backend-ram,id=r,size=1G",
                "-object memory-backend-file,id=r,size=1G,mem-path=FILE,share=on",
            ),
            ("-object memory-backend-file,id=r,size=1G,mem-path=/f", "the option share=on"),
        ] {
            let error = plan(&words(line), &Facts::default()).unwrap_err();
            assert!(error.remedy_text().unwrap().contains(text), "{line}: {error:?}");
        }
    }

    #[test]
    fn monitors_go_and_serial_chardevs_become_files() {
        let plan = planned(
            "-chardev socket,id=m,path=/x,server=on -mon chardev=m,mode=control \
             -chardev stdio,id=con -device isa-serial,chardev=con",
        )
        .unwrap();
        let line = plan.argv.join(" ");
        assert!(line.contains("-device isa-serial,chardev=con"));
        assert!(line.contains("-chardev file,id=con,path={dir}/chardev-con.log"));
        assert!(!line.contains("stdio") && !line.contains("/x"), "{line}");
    }

    #[test]
    fn a_second_ram_backend_is_a_second_file() {
        let plan = planned("-object memory-backend-file,id=ram1,size=1M,mem-path=/tmp/b,share=on").unwrap();
        assert_eq!(plan.ram[1].file, "memory-ram1");
        assert!(plan.argv.join(" ").contains("mem-path={file:memory-ram1},"));
    }
}
