//! Disks of a captured VM: `-drive`, `-blockdev`, `-hda` and similar options.
//!
//! Each clone writes to its own overlay, `{disk:NAME}`; a read-only disk is a file of the template.

use std::collections::BTreeMap;
use std::path::Path;

use super::host::LiveDisk;
use super::props::{Props, is_on};
use super::values::placeholders;

/// A disk of clones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    /// Name of the disk; the template file is `disk-NAME`.
    pub name: String,
    /// The medium of the VM.
    pub live: LiveDisk,
    /// Format of the template file.
    pub format: String,
}

impl PlannedDisk {
    /// Returns the name of the template file.
    pub fn file(&self) -> String {
        format!("disk-{}", self.name)
    }

    /// Returns true if the template stores the image file itself, false if it stores the guest-visible contents as raw.
    pub fn is_verbatim(&self) -> bool {
        self.live.image.backing.is_none() && (self.live.read_only || self.live.image.format == "raw")
    }
}

/// Collects the disks of a command line.
#[derive(Debug, Default)]
pub struct Disks {
    live: Vec<LiveDisk>,
    nodes: BTreeMap<String, Props>,
    planned: Vec<PlannedDisk>,
    /// Disks that are unsupported for clones, with the reason.
    pub refused: Vec<String>,
    /// Media that no option of the command line names.
    pub absent: Vec<LiveDisk>,
    /// Number of devices that disk options create, beside those of `-device`.
    pub devices: usize,
}

/// Properties of `-drive` that clones keep, because a guest can see them or because they limit a guest.
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

/// Properties that clones drop: caching and I/O methods of the host, which a guest cannot see.
const HOST_PROPERTIES: [&str; 13] = [
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
    /// Creates a collector for a VM with these media.
    pub fn new(live: &[LiveDisk]) -> Disks {
        Disks { live: live.to_vec(), ..Disks::default() }
    }

    /// Converts `-hda FILE` and similar options to the `-drive` of clones.
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

    /// Converts a `-drive` to that of clones.
    pub fn drive(&mut self, text: &str, shown: &str) -> Option<String> {
        let Some(mut props) = Props::parse(text, "file").filter(|p| !p.has_braces()) else {
            self.refused.push(format!("{shown}: cannot parse its properties"));
            return None;
        };
        if props.get("if") == Some("virtio") {
            self.devices += 1;
        }
        let path = props.get("file").or(props.get("file.filename")).map(str::to_owned);
        let throttles =
            |key: &str| key.starts_with("throttling.") || key.starts_with("bps") || key.starts_with("iops");
        let unsupported: Vec<String> = props
            .iter()
            .filter(|(key, value)| match *key {
                "file" | "file.filename" | "cache" | "readonly" | "read-only" => false,
                "format" | "driver" => !matches!(*value, "raw" | "qcow2" | "file"),
                "file.driver" => *value != "file",
                "snapshot" => *value != "off",
                key => !KEPT.contains(&key) && !HOST_PROPERTIES.contains(&key) && !throttles(key),
            })
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        if !unsupported.is_empty() {
            self.refused.push(format!("{shown}: a disk with {}", unsupported.join(",")));
            // Keeps `finish` from refusing the medium a second time, as absent from the command line.
            self.live.retain(|live| props.get("id").is_none_or(|id| live.device != id));
            return None;
        }
        let Some(path) = path else { return Some(props.render("")) };
        let disk = self.take(shown, |live| match props.get("id").or(props.get("node-name")) {
            Some(id) => live.device == id || live.node == id,
            None => live.image.path == Path::new(&path),
        })?;
        // The guest sees whether the cache is write-through (no flush needed), but no other cache mode.
        let through = matches!(props.get("cache"), Some("writethrough" | "directsync"))
            || props.get("cache.writeback").is_some_and(|v| !is_on(Some(v)));
        for key in HOST_PROPERTIES.iter().chain(&[
            "cache",
            "snapshot",
            "driver",
            "file.driver",
            "file.filename",
            "read-only",
        ]) {
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

    /// Records a `-blockdev`; `finish` converts it, when all its users are known.
    pub fn blockdev(&mut self, text: &str) {
        match Props::parse(text, "driver").filter(|p| !p.has_braces()) {
            Some(props) => {
                let name = props.get("node-name").unwrap_or_default().to_owned();
                self.nodes.insert(name, props);
            }
            None => self.refused.push(format!("-blockdev {text}: cannot parse its properties")),
        }
    }

    /// Plans the medium that an option refers to.
    fn take(&mut self, shown: &str, is_it: impl Fn(&LiveDisk) -> bool) -> Option<PlannedDisk> {
        let Some(at) = self.live.iter().position(is_it) else {
            self.refused
                .push(format!("{shown}: a disk whose image is no longer inserted (changed or ejected)"));
            return None;
        };
        let live = self.live.remove(at);
        if let Some(problem) = &live.problem {
            self.refused.push(format!("{shown}: {problem}"));
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

    /// Returns all planned disks, and the `-blockdev` options of clones.
    pub fn finish(&mut self) -> (Vec<PlannedDisk>, Vec<String>) {
        let nodes = std::mem::take(&mut self.nodes);
        let lower_nodes: Vec<&str> =
            nodes.values().flat_map(|p| [p.get("file"), p.get("backing")]).flatten().collect();
        let mut options = vec![];
        for (name, props) in nodes.iter().filter(|(name, _)| !lower_nodes.contains(&name.as_str())) {
            let shown = format!("-blockdev {name}");
            if let Some(option) = self.node(&shown, name, props, &nodes) {
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
        shown: &str,
        name: &str,
        props: &Props,
        nodes: &BTreeMap<String, Props>,
    ) -> Option<String> {
        let lower = props.get("file").and_then(|below| nodes.get(below));
        let kept = ["discard", "detect-zeroes", "force-share"];
        let tuning = |key: &str| {
            key.ends_with("cache-size") || key.contains("refcounts") || key.contains("pass-discard")
        };
        let is_supported = |key: &str, value: &str, is_lower: bool| match key {
            "driver" if is_lower => value == "file",
            "driver" => matches!(value, "qcow2" | "raw" | "file"),
            "file.driver" => value == "file",
            "node-name" | "filename" | "file" | "file.filename" | "read-only" | "backing" => true,
            key => {
                kept.contains(&key)
                    || HOST_PROPERTIES.contains(&key)
                    || tuning(key)
                    || key == "file.node-name"
                    || key == "file.discard"
            }
        };
        let mut unsupported: Vec<String> = vec![];
        for (props, is_lower) in [Some((props, false)), lower.map(|l| (l, true))].into_iter().flatten() {
            unsupported.extend(
                props.iter().filter(|(k, v)| !is_supported(k, v, is_lower)).map(|(k, v)| format!("{k}={v}")),
            );
        }
        if !unsupported.is_empty() {
            self.refused.push(format!("{shown}: a disk with {}", unsupported.join(",")));
            return None;
        }
        let disk = self.take(shown, |live| live.node == name)?;
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
