//! Disks of a captured VM: `-drive`, `-blockdev`, `-hda` and their kind.
//!
//! A clone writes to an overlay of its own, `{disk:NAME}`; what the guest cannot write is a file of the template.

use std::collections::BTreeMap;
use std::path::Path;

use super::host::LiveDisk;
use super::props::Props;
use super::values::placeholders;

/// A disk of clones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    /// Its name; the template's file is `disk-NAME`.
    pub name: String,
    /// The VM's medium.
    pub live: LiveDisk,
    /// Format of the template's file.
    pub format: String,
}

impl PlannedDisk {
    /// The template's file.
    pub fn file(&self) -> String {
        format!("disk-{}", self.name)
    }

    /// True when the template gets the image as it is, not what the guest sees in it.
    pub fn as_it_is(&self) -> bool {
        self.live.image.backing.is_none() && (self.live.read_only || self.live.image.format == "raw")
    }
}

/// Gathers the disks of a command line.
#[derive(Debug, Default)]
pub struct Disks {
    live: Vec<LiveDisk>,
    nodes: BTreeMap<String, Props>,
    planned: Vec<PlannedDisk>,
    /// What clones cannot have.
    pub refused: Vec<String>,
    /// Media that no option names.
    pub absent: Vec<LiveDisk>,
    /// Devices that options of disks make besides `-device`.
    pub devices: usize,
}

/// Options of `-drive` that clones keep, because guests can see them or because they limit a guest.
const KEPT: [&str; 14] = [
    "if",
    "index",
    "bus",
    "unit",
    "media",
    "id",
    "node-name",
    "discard",
    "detect-zeroes",
    "werror",
    "rerror",
    "serial",
    "group",
    "force-share",
];

/// Options that are the host's affair: caches and ways to do I/O do not change what a guest sees.
const HOSTS: [&str; 13] = [
    "aio",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
    "copy-on-read",
    "locking",
    "auto-read-only",
    "file.locking",
    "file.aio",
    "file.cache.direct",
    "file.cache.no-flush",
    "file.auto-read-only",
    "file.read-only",
];

impl Disks {
    /// Disks of a VM that has these media.
    pub fn new(live: &[LiveDisk]) -> Disks {
        Disks { live: live.to_vec(), ..Disks::default() }
    }

    /// `-hda FILE` and its kind: the same as a `-drive`.
    pub fn short(&mut self, option: &str, path: &str) -> Option<String> {
        let words = match option {
            "hda" => "index=0,media=disk",
            "hdb" => "index=1,media=disk",
            "hdc" => "index=2,media=disk",
            "hdd" => "index=3,media=disk",
            "cdrom" => "index=2,media=cdrom",
            "fda" => "if=floppy,index=0",
            "fdb" => "if=floppy,index=1",
            "sd" => "if=sd",
            _ => "if=pflash",
        };
        self.drive(&format!("{words},file={}", path.replace(',', ",,")), &format!("-{option} {path}"))
    }

    /// A `-drive`; gives the one of clones.
    pub fn drive(&mut self, text: &str, said: &str) -> Option<String> {
        let Some(mut props) = Props::parse(text, "file").filter(|p| !p.has_braces()) else {
            self.refused.push(format!("{said}, which cannot be taken apart"));
            return None;
        };
        if props.get("if") == Some("virtio") {
            self.devices += 1;
        }
        let path = props.get("file").or(props.get("file.filename")).map(str::to_owned);
        let throttles =
            |key: &str| key.starts_with("throttling.") || key.starts_with("bps") || key.starts_with("iops");
        let odd: Vec<String> = props
            .iter()
            .filter(|(key, value)| match *key {
                "file" | "file.filename" | "cache" | "readonly" | "read-only" => false,
                "format" | "driver" => !matches!(*value, "raw" | "qcow2" | "file"),
                "file.driver" => *value != "file",
                "snapshot" => *value != "off",
                key => !KEPT.contains(&key) && !HOSTS.contains(&key) && !throttles(key),
            })
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        if !odd.is_empty() {
            self.refused.push(format!("{said}: a disk with {}", odd.join(",")));
            // It is not told again as one that is not on the command line.
            self.live.retain(|live| props.get("id").is_none_or(|id| live.device != id));
            return None;
        }
        let Some(path) = path else { return Some(props.render("")) };
        let disk = self.take(said, |live| match props.get("id").or(props.get("node-name")) {
            Some(id) => live.device == id || live.node == id,
            None => live.image.path == Path::new(&path),
        })?;
        // Write-through is seen by guests; all else of a cache is the host's.
        let through = matches!(props.get("cache"), Some("writethrough" | "directsync"))
            || props.get("cache.writeback").is_some_and(|v| !super::memory::is_on(Some(v)));
        for key in
            HOSTS.iter().chain(&["cache", "snapshot", "driver", "file.driver", "file.filename", "read-only"])
        {
            props.remove(key);
        }
        if through {
            props.set("cache", "writethrough");
        }
        if disk.live.read_only {
            props.set("file", &format!("{{file:{}}}", disk.file()));
            props.set("format", &disk.format);
            if props.get("media") != Some("cdrom") {
                props.set("readonly", "on");
            }
        } else {
            props.remove("readonly");
            props.set("file", &format!("{{disk:{}}}", disk.name));
            props.set("format", "qcow2");
        }
        Some(props.render(""))
    }

    /// A `-blockdev`; what uses it is seen at the end.
    pub fn blockdev(&mut self, text: &str) {
        match Props::parse(text, "driver").filter(|p| !p.has_braces()) {
            Some(props) => {
                let name = props.get("node-name").unwrap_or_default().to_owned();
                self.nodes.insert(name, props);
            }
            None => self.refused.push(format!("-blockdev {text}, which cannot be taken apart")),
        }
    }

    /// The medium of the VM that an option means.
    fn take(&mut self, said: &str, is_it: impl Fn(&LiveDisk) -> bool) -> Option<PlannedDisk> {
        let Some(at) = self.live.iter().position(is_it) else {
            self.refused.push(format!("{said}: a disk whose image the VM has no more (changed or ejected)"));
            return None;
        };
        let live = self.live.remove(at);
        if let Some(problem) = &live.problem {
            self.refused.push(format!("{said}: {problem}"));
            return None;
        }
        let wanted = [&live.device, &live.node].into_iter().find(|n| !n.is_empty() && !n.starts_with('#'));
        let stem: String = wanted
            .map_or("disk", String::as_str)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' })
            .take(64)
            .collect();
        let mut name = stem.clone();
        for number in 2.. {
            if !self.planned.iter().any(|d| d.name == name) {
                break;
            }
            name = format!("{stem}-{number}");
        }
        let plain = live.image.backing.is_none();
        let format = if live.read_only && plain { live.image.format.clone() } else { "raw".into() };
        let disk = PlannedDisk { name, live, format };
        self.planned.push(disk.clone());
        Some(disk)
    }

    /// All disks, and the `-blockdev` options of clones.
    pub fn finish(&mut self) -> (Vec<PlannedDisk>, Vec<String>) {
        let nodes = std::mem::take(&mut self.nodes);
        let beneath: Vec<&str> =
            nodes.values().flat_map(|p| [p.get("file"), p.get("backing")]).flatten().collect();
        let mut options = vec![];
        for (name, props) in nodes.iter().filter(|(name, _)| !beneath.contains(&name.as_str())) {
            let said = format!("-blockdev {name}");
            if let Some(option) = self.node(&said, name, props, &nodes) {
                options.push(option);
            }
        }
        for live in std::mem::take(&mut self.live) {
            let name = [&live.device, &live.qdev, &live.node].into_iter().find(|n| !n.is_empty()).cloned();
            let name = name.unwrap_or_default();
            let problem = live.problem.as_ref().map(|p| format!(" ({p})")).unwrap_or_default();
            self.refused.push(format!("disk {name}, which is not on the command line{problem}"));
            self.absent.push(live);
        }
        (std::mem::take(&mut self.planned), options)
    }

    fn node(
        &mut self,
        said: &str,
        name: &str,
        props: &Props,
        nodes: &BTreeMap<String, Props>,
    ) -> Option<String> {
        let lower = props.get("file").and_then(|below| nodes.get(below));
        let kept = ["discard", "detect-zeroes", "force-share"];
        let tuning = |key: &str| {
            key.ends_with("cache-size") || key.contains("refcounts") || key.contains("pass-discard")
        };
        let fine = |key: &str, value: &str, is_lower: bool| match key {
            "driver" if is_lower => value == "file",
            "driver" => matches!(value, "qcow2" | "raw" | "file"),
            "file.driver" => value == "file",
            "node-name" | "filename" | "file" | "file.filename" | "read-only" | "backing" => true,
            key => {
                kept.contains(&key)
                    || HOSTS.contains(&key)
                    || tuning(key)
                    || key == "file.node-name"
                    || key == "file.discard"
            }
        };
        let mut odd: Vec<String> = vec![];
        for (props, is_lower) in [Some((props, false)), lower.map(|l| (l, true))].into_iter().flatten() {
            odd.extend(props.iter().filter(|(k, v)| !fine(k, v, is_lower)).map(|(k, v)| format!("{k}={v}")));
        }
        if !odd.is_empty() {
            self.refused.push(format!("{said}: a disk with {}", odd.join(",")));
            return None;
        }
        let disk = self.take(said, |live| live.node == name)?;
        let (place, format) = match disk.live.read_only {
            true => (format!("{{file:{}}}", disk.file()), disk.format.as_str()),
            false => (format!("{{disk:{}}}", disk.name), "qcow2"),
        };
        let mut text = format!(
            "driver={format},node-name={name},read-only={},file.driver=file,file.filename={place}",
            if disk.live.read_only { "on" } else { "off" }
        );
        for key in kept {
            if let Some(value) = props.get(key) {
                text.push_str(&format!(",{key}={value}"));
            }
        }
        debug_assert!(placeholders(&text).next().is_some());
        Some(text)
    }
}
