//! Converts the command line of a running QEMU to that of its clones: a pure function of the arguments and [`Facts`].
//!
//! An option that is not known to be safe for several clones at once is refused: two clones must never write to one
//! disk, use one network address or share one socket.

mod parts;

use std::path::PathBuf;

use super::disks::Disks;
use super::libvirt::Secrets;
use super::memory::{self, Memory, Problem, Ram, Rom};
use super::network::Networks;
use super::props::{Props, is_on};
use super::rules::{
    Rule, device_type, is_device_for_clones, is_host_resource, is_nic, rule, unsupported_reason,
    unsupported_value,
};
use super::values::placeholders;
use crate::clones::recipe::chardevs;
use crate::error::{Error, Result};
pub use parts::{Blob, Examined, Facts, Plan, Refusal};

/// Converts the command line of a running VM, without its program name, to that of clones.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) with all unsupported options, or with the options to add for RAM
/// in a shared file.
pub fn plan(argv: &[String], facts: &Facts) -> Result<Plan> {
    let examined = examine(argv, facts)?;
    examined.error().map_or(Ok(examined.plan), Err)
}

/// Same as [`plan`], but returns the obstacles beside the result.
///
/// # Errors
/// Returns an error if the command line ends before the value of an option.
pub fn examine(argv: &[String], facts: &Facts) -> Result<Examined> {
    let mut converter = Converter::new(facts);
    let mut words = argv.iter().enumerate();
    while let Some((at, word)) = words.next() {
        converter.collect();
        converter.at = Some(at);
        let Some(option) = word.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)) else {
            let option = converter.disks.short("hda", word);
            converter.keep_some("drive", option);
            continue;
        };
        let mut value = || {
            words
                .next()
                .map(|(_, value)| value.as_str())
                .ok_or_else(|| Error::failed(format!("QEMU's command line has no value for {word}")))
        };
        match rule(option) {
            Rule::Keep(false) => converter.keep(option, None),
            Rule::Keep(true) => {
                let value = value()?;
                converter.note_kept(option, value);
                converter.keep(option, Some(value));
            }
            Rule::Drop(false) => {}
            Rule::Drop(true) => drop(value()?),
            Rule::Machine => converter.machine(value()?),
            Rule::Object => converter.object(value()?),
            Rule::Device => converter.device(value()?),
            Rule::Chardev => converter.chardev(value()?),
            Rule::Serial => converter.serial(value()?),
            Rule::Mon => converter.mon(value()?),
            Rule::File => converter.file(option, value()?),
            Rule::FileIfPath => {
                let value = value()?;
                match value.contains('/') {
                    true => converter.file(option, value),
                    false => converter.keep(option, Some(value)),
                }
            }
            Rule::Firmware => converter.firmware(option, value()?),
            Rule::Parallel => converter.parallel = Some(if value()? == "none" { "none" } else { "null" }),
            Rule::Network => {
                let changed = converter.networks.option(option, value()?);
                converter.keep_some(option, changed);
            }
            Rule::Audio => converter.audio(value()?),
            Rule::Drive => {
                let value = value()?;
                let changed = converter.disks.drive(value, &format!("-drive {value}"));
                converter.keep_some("drive", changed);
            }
            Rule::Disk => {
                let changed = converter.disks.short(option, value()?);
                converter.keep_some("drive", changed);
            }
            Rule::Blockdev => {
                let value = value()?;
                converter.name(value, "driver", "node-name");
                converter.disks.blockdev(value);
            }
            Rule::Refuse(reason) => {
                let value = value()?;
                converter.refuse(format!("-{option} {value}: {reason}"));
            }
            Rule::Unknown => converter.refuse(format!("-{option}: unknown option")),
        }
    }
    converter.collect();
    converter.at = None;
    Ok(converter.finish())
}

struct Converter<'a> {
    facts: &'a Facts,
    argv: Vec<String>,
    ram: Vec<Ram>,
    roms: Vec<Rom>,
    blobs: Vec<Blob>,
    disks: Disks,
    networks: Networks,
    chardevs: Vec<(String, Option<Props>)>,
    used_chardevs: Vec<String>,
    parallel: Option<&'static str>,
    monitors: Vec<String>,
    serials: usize,
    serial_given: bool,
    devices: Vec<String>,
    secrets: Secrets,
    refused: Vec<Refusal>,
    ram_problems: Vec<Refusal>,
    /// Index of the current option.
    at: Option<usize>,
    /// Indexes of the options that are converted at the end, by id.
    named: Vec<(String, usize)>,
    nodefaults: bool,
    machine_given: bool,
    machine: String,
    size: String,
    prealloc: bool,
}

impl<'a> Converter<'a> {
    fn new(facts: &'a Facts) -> Self {
        Converter {
            facts,
            argv: vec![],
            ram: vec![],
            roms: vec![],
            blobs: vec![],
            disks: Disks::new(&facts.disks),
            networks: Networks::default(),
            chardevs: vec![],
            used_chardevs: vec![],
            parallel: None,
            monitors: vec![],
            serials: 0,
            serial_given: false,
            devices: vec![],
            secrets: Secrets::default(),
            refused: vec![],
            ram_problems: vec![],
            at: None,
            named: vec![],
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

    fn keep_some(&mut self, option: &str, value: Option<String>) {
        if let Some(value) = value {
            self.keep(option, Some(&value));
        }
    }

    fn refuse(&mut self, what: String) {
        self.refused.push(Refusal { at: self.at, what });
    }

    /// Takes over the refusals of disks and networks for the current option.
    fn collect(&mut self) {
        let all = [&mut self.disks.refused, &mut self.networks.refused];
        let all: Vec<String> = all.into_iter().flat_map(std::mem::take).collect();
        all.into_iter().for_each(|what| self.refuse(what));
    }

    fn name(&mut self, text: &str, implied: &str, key: &str) {
        let id = Props::parse(text, implied).and_then(|props| props.get(key).map(str::to_owned));
        self.named.extend(id.zip(self.at));
    }

    /// Records a refusal of the option with this id.
    fn refuse_named(&mut self, id: &str, what: String) {
        let at = self.named.iter().find(|(name, _)| name == id).map(|(_, at)| *at);
        self.refused.push(Refusal { at, what });
    }

    fn note_kept(&mut self, option: &str, value: &str) {
        if let Some(name) = placeholders(value).next() {
            self.refuse(format!("-{option} {value}: {{{name}}} would be taken for a placeholder"));
        }
        if let Some(why) = unsupported_value(option, value) {
            self.refuse(format!("-{option} {value}: {why}"));
        }
        if option == "m" {
            let size = Props::parse(value, "size");
            size.as_ref().and_then(|p| p.get("size")).unwrap_or(value).clone_into(&mut self.size);
            // A bare number means MiB in -m, but bytes in an object.
            if self.size.bytes().all(|b| b.is_ascii_digit()) {
                self.size.push('M');
            }
        }
    }

    fn props(&mut self, option: &str, text: &str, implied: &str) -> Option<Props> {
        let props = Props::parse(text, implied);
        match &props {
            Some(props) if !props.has_braces() => {}
            _ => self.refuse(format!("-{option} {text}: cannot parse its properties")),
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
        for key in ["memory-encryption", "confidential-guest-support"] {
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
            // Dropped, unless a remaining option refers to the secret (checked at the end).
            "secret" => self.secrets.add(id),
            _ if memory::is_memory(&kind) => {
                let prealloc = is_on(props.get("prealloc"));
                match memory::object(&mut props, self.ram.len(), &self.size) {
                    Ok(Memory::Ram(ram)) => {
                        self.prealloc |= prealloc;
                        self.ram.push(ram);
                    }
                    Ok(Memory::Rom(rom)) => self.roms.push(rom),
                    Err(Problem(what)) => return self.ram_problems.push(Refusal { at: self.at, what }),
                }
                self.keep("object", Some(&props.render("qom-type")));
            }
            _ => self.refuse(format!("object {kind} ({id})")),
        }
    }

    fn device(&mut self, text: &str) {
        let Some(mut props) = self.props("device", text, "driver") else { return };
        props.lead_with("driver");
        let driver = device_type(props.get("driver").unwrap_or_default()).to_owned();
        props.set("driver", &driver);
        if driver.starts_with("vhost-vsock") {
            // The QEMU of each clone opens /dev/vhost-vsock itself.
            props.remove("vhostfd");
        }
        let id = props.get("id").map(|id| format!(" ({id})")).unwrap_or_default();
        if !is_device_for_clones(&driver) {
            return self.refuse(format!("device {driver}{id}{}", unsupported_reason(&driver)));
        }
        if let Some((key, value)) = props.iter().find(|(key, value)| is_host_resource(key, value)) {
            return self.refuse(format!("device {driver}{id} with {key}={value}"));
        }
        if driver == "nvdimm"
            && let Some(refusal) = memory::nvdimm(&props, &self.roms)
        {
            return self.refuse(refusal);
        }
        if driver == "vmgenid" {
            props.set("guid", "auto");
        }
        if driver.starts_with("vhost-vsock") {
            if self.devices.contains(&driver) {
                return self.refuse(format!("a second device {driver}{id}"));
            }
            props.set("guest-cid", "{cid}");
        }
        if is_nic(&driver) {
            props.set("mac", &self.networks.mac());
        }
        if let Some(chardev) = props.get("chardev") {
            self.use_chardev(chardev);
        }
        self.devices.push(driver);
        self.keep("device", Some(&props.render("driver")));
    }

    fn use_chardev(&mut self, id: &str) {
        self.used_chardevs.push(id.to_owned());
    }

    fn chardev(&mut self, text: &str) {
        let Some(mut props) = self.props("chardev", text, "backend") else { return };
        props.lead_with("backend");
        self.name(text, "backend", "id");
        self.chardevs.push((props.get("id").unwrap_or_default().to_owned(), Some(props)));
    }

    /// Converts a firmware option: its files go into the template, its UUID becomes a placeholder.
    fn firmware(&mut self, option: &str, text: &str) {
        let Some(mut props) = self.props(option, text, if option == "fw_cfg" { "name" } else { "type" })
        else {
            return;
        };
        for key in ["file", "path"] {
            for value in props.all_mut(key) {
                let file = format!("{}-{}", option.replace('_', "-"), self.blobs.len());
                let path = std::mem::replace(value, format!("{{file:{file}}}")).into();
                self.blobs.push(Blob { file, path });
            }
        }
        if props.get("uuid").is_some() {
            props.set("uuid", "{uuid}");
        }
        self.keep(option, Some(&props.render(if option == "fw_cfg" { "name" } else { "" })));
    }

    fn audio(&mut self, text: &str) {
        let Some(mut props) = self.props("audiodev", text, "driver") else { return };
        props.lead_with("driver");
        match props.get("driver") {
            Some("none") => self.keep("audiodev", Some(&props.render("driver"))),
            _ => self.refuse(format!("-audiodev {text}: a host resource")),
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
            None => match chardevs::serial(value, self.serials) {
                Some(changed) => {
                    self.serials += 1;
                    self.keep("serial", Some(&changed));
                }
                None => self.refuse(format!("-serial {value}: a host resource")),
            },
        }
    }

    fn file(&mut self, option: &str, value: &str) {
        self.blobs.push(Blob { file: option.to_owned(), path: PathBuf::from(value) });
        self.keep(option, Some(&format!("{{file:{option}}}")));
    }

    fn finish(mut self) -> Examined {
        if self.ram.is_empty() && self.ram_problems.is_empty() {
            let machine = if self.machine.is_empty() { "q35" } else { self.machine.as_str() };
            let what = format!(
                "add -machine {machine},memory-backend=ram0 -object memory-backend-file,id=ram0,size={},mem-path=FILE,share=on",
                self.size
            );
            self.ram_problems.push(Refusal { at: None, what });
        }
        let (disks, nodes) = self.disks.finish();
        for what in std::mem::take(&mut self.disks.refused) {
            let node =
                what.strip_prefix("-blockdev ").and_then(|rest| rest.split(':').next()).map(str::to_owned);
            self.refuse_named(&node.unwrap_or_default(), what);
        }
        for node in nodes {
            self.keep("blockdev", Some(&node));
        }
        for (id, props) in std::mem::take(&mut self.chardevs) {
            let Some(props) =
                props.filter(|_| self.used_chardevs.contains(&id) && !self.monitors.contains(&id))
            else {
                continue;
            };
            let backend = props.get("backend").unwrap_or_default();
            match chardevs::kind(backend) {
                Some(kind) => self.keep("chardev", Some(&chardevs::option(&id, kind, &props))),
                None => self.refuse_named(&id, format!("-chardev {backend},id={id}: a host resource")),
            }
        }
        self.secrets.needed(&self.argv).into_iter().for_each(|what| self.refuse(what));
        if !self.nodefaults && !self.networks.given {
            let mac = self.networks.mac();
            self.keep("nic", Some(&format!("user,mac={mac}")));
        }
        if !self.serial_given && !self.nodefaults {
            self.keep("serial", Some("file:{dir}/serial.log"));
        }
        let parallel = self.parallel.unwrap_or(if self.nodefaults { "none" } else { "null" });
        self.keep("parallel", Some(parallel));
        if !self.machine_given
            && let Some(pinned) = &self.facts.machine_type
        {
            let pinned = pinned.clone();
            self.keep("machine", Some(&pinned));
        }
        for (option, value) in [
            ("name", "stencil-{id}"),
            ("uuid", "{uuid}"),
            ("display", "none"),
            ("monitor", "none"),
            ("chardev", "socket,id=stencil-qmp,path={dir}/qmp.sock,server=on,wait=off"),
            ("mon", "chardev=stencil-qmp,mode=control"),
            ("incoming", "defer"),
        ] {
            self.keep(option, Some(value));
        }
        let mut warnings = self.warnings();
        warnings.append(&mut self.networks.warnings);
        let devices = self.devices.len() + self.disks.devices;
        let Converter { argv, ram, roms, blobs, .. } = self;
        Examined {
            plan: Plan { argv, ram, roms, blobs, disks, devices, warnings },
            ram_problems: self.ram_problems,
            refused: self.refused,
            absent: self.disks.absent,
            ram_size: self.size,
            secrets: self.secrets,
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = vec![];
        if !self.devices.iter().any(|d| d == "vmgenid") {
            warnings.push(
                "the VM has no vmgenid: guests cannot detect that they were cloned; start the VM with -device \
                 vmgenid,guid=auto"
                    .to_owned(),
            );
        }
        if !self.devices.iter().any(|d| d.starts_with("virtio-rng")) {
            warnings.push(
                "the VM has no virtio-rng: clones continue from one random number state; start the VM with \
                 -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0"
                    .to_owned(),
            );
        }
        for pair in self.argv.windows(2).filter(|pair| pair[0] == "-L") {
            warnings
                .push(format!("clones search {} for firmware on the host that they run on (-L)", pair[1]));
        }
        if self.prealloc {
            warnings
                .push("prealloc is removed for clones: it would copy every page of the template".to_owned());
        }
        warnings
    }
}

#[cfg(test)]
mod tests;
