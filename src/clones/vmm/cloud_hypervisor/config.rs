//! `config.json`: Cloud Hypervisor's `VmConfig`.

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Zone that Cloud Hypervisor makes of memory without zones.
const DEFAULT_ZONE: &str = "mem0";

/// Devices that cannot be made for a clone, with the reason.
const REFUSED: [(&str, &str); 8] = [
    ("fs", SHARES),
    ("generic_vhost_user", SHARES),
    ("devices", PINS),
    ("user_devices", PINS),
    ("vdpa", PINS),
    ("pvmemcontrol", "it changes memory in a way that only anonymous memory allows"),
    ("tpm", "its emulator has the state of one guest"),
    ("ivshmem", "its file is shared by all clones"),
];
const SHARES: &str = "it needs shared guest memory (vhost-user), but template memory must be private";
const PINS: &str = "it pins guest memory, which copies each page";

/// Options of memory and zones that must not be set, because a clone would not share the template.
const SHARING: [&str; 4] = ["shared", "hugepages", "prefault", "host_numa_node"];

/// Devices with output, and the name of their log or socket in the directory of a clone.
const OUTPUTS: [(&str, &str); 3] =
    [("serial", "serial"), ("console", "console"), ("debug_console", "debug-console")];

/// Returns the names of the memory zones.
pub(super) fn zone_ids(config: &Value) -> Vec<String> {
    let zones = array(&config["memory"]["zones"]);
    match config["memory"]["size"].as_u64() {
        Some(0) => zones.filter_map(|zone| zone["id"].as_str()).map(str::to_owned).collect(),
        _ => vec![DEFAULT_ZONE.to_owned()],
    }
}

/// Maps all memory zones privately from the file at `path`, and moves sockets and logs into `dir`. Returns notes for
/// the user.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if a device or hot-plugged memory does not allow that.
pub(super) fn convert(config: &mut Value, path: &str, dir: &str) -> Result<Vec<String>> {
    refuse(config)?;
    let mut notes = vec![];
    let removed = memory(config, path)?;
    if !removed.is_empty() {
        notes.push(format!(
            "removed options with which clones would not share memory: {}",
            removed.join(", ")
        ));
    }
    for (name, device) in OUTPUTS {
        // With mode Pty, `file` is the terminal of the source VM, which Cloud Hypervisor replaces.
        match config[name]["mode"].as_str() {
            Some("File") => config[name]["file"] = json!(format!("{dir}/{device}.log")),
            Some("Socket") => config[name]["socket"] = json!(format!("{dir}/{device}.sock")),
            _ => {}
        }
    }
    if config["vsock"].is_object() {
        config["vsock"]["socket"] = json!(format!("{dir}/vsock.sock"));
    }
    if config["balloon"].is_object() {
        let why = "Cloud Hypervisor punches holes into the memory file, which is read-only";
        notes.push(format!("the balloon frees no memory of a clone: {why}"));
    }
    Ok(notes)
}

fn refuse(config: &Value) -> Result<()> {
    let present = |value: &Value| match value {
        Value::Array(list) => !list.is_empty(),
        value => !value.is_null(),
    };
    let device = |(name, why): (&str, &str)| {
        Error::usage(format!("device '{name}' of the snapshot cannot be made for a clone: {why}"))
            .hint("take the snapshot of a VM without this device")
    };
    if let Some(found) = REFUSED.into_iter().find(|(name, _)| present(&config[*name])) {
        return Err(device(found));
    }
    for kind in ["disks", "net"] {
        if array(&config[kind]).any(|device| device["vhost_user"] == true) {
            return Err(device((kind, SHARES)));
        }
    }
    let memory = &config["memory"];
    if std::iter::once(memory).chain(array(&memory["zones"])).any(|m| !m["hotplug_size"].is_null()) {
        return Err(Error::usage(
            "the memory of the snapshot has hotplug_size, but a template has a fixed size",
        )
        .hint("take the snapshot of a VM without hotplug_size"));
    }
    Ok(())
}

/// Sets the memory zones. Returns the options that were removed.
fn memory(config: &mut Value, path: &str) -> Result<Vec<String>> {
    let invalid = || Error::usage("config.json has no memory: Cloud Hypervisor did not write the file");
    let memory = config.get_mut("memory").and_then(Value::as_object_mut).ok_or_else(invalid)?;
    let size = memory.get("size").and_then(Value::as_u64).ok_or_else(invalid)?;
    let mut removed = remove_options(memory);
    if size > 0 {
        let mut zone =
            Map::from_iter([("id".to_owned(), json!(DEFAULT_ZONE)), ("size".to_owned(), json!(size))]);
        let inherited = ["reserve", "mergeable"].into_iter().filter_map(|key| memory.get_key_value(key));
        zone.extend(inherited.map(|(key, value)| (key.clone(), value.clone())).collect::<Vec<_>>());
        memory.insert("size".to_owned(), json!(0));
        memory.insert("zones".to_owned(), json!([zone]));
    }
    memory.insert("thp".to_owned(), json!(true));
    for zone in memory.get_mut("zones").and_then(Value::as_array_mut).ok_or_else(invalid)? {
        let zone = zone.as_object_mut().ok_or_else(invalid)?;
        for option in remove_options(zone) {
            // The zones of the source VM were shared because their files were its memory. Without the option nothing is
            // lost.
            if option != "shared=on" && !removed.contains(&option) {
                removed.push(option);
            }
        }
        zone.insert("file".to_owned(), json!(path));
        zone.insert("shared".to_owned(), json!(false));
    }
    Ok(removed)
}

fn remove_options(memory: &mut Map<String, Value>) -> Vec<String> {
    memory.remove("hugepage_size");
    let removed = SHARING.into_iter().filter_map(|key| match memory.remove(key)? {
        Value::Bool(true) => Some(format!("{key}=on")),
        Value::Number(node) => Some(format!("{key}={node}")),
        _ => None,
    });
    removed.collect()
}

/// Returns the files and host devices that all clones open under the name that the source VM used.
pub(super) fn shared(config: &Value) -> Vec<String> {
    let named = |kind: &str, key: &str| {
        let paths = array(&config[kind]).filter_map(|device| device[key].as_str());
        paths.map(|name| format!("{key} {name} of {kind}")).collect::<Vec<_>>()
    };
    [named("disks", "path"), named("pmem", "file"), named("net", "tap")].concat()
}

/// Returns the files and host devices to which several clones would write, except for the network devices in
/// `taps`. A relative path leads to a file in the directory of the clone.
pub(super) fn written(config: &Value, taps: &[(String, String)]) -> Vec<String> {
    let absolute = |path: &&str| path.starts_with('/');
    let disks = array(&config["disks"]).filter(|disk| disk["readonly"] != true);
    let disks = disks.filter_map(|disk| disk["path"].as_str()).filter(absolute);
    let pmem = array(&config["pmem"]).filter(|pmem| pmem["discard_writes"] != true);
    let pmem = pmem.filter_map(|pmem| pmem["file"].as_str()).filter(absolute);
    // A TAP device with several queues can be opened by several processes.
    let differs = |tap: &str| tap.contains("{id}") || tap.contains("{index}");
    let own = |id: &Value| taps.iter().any(|(of, tap)| id == of.as_str() && differs(tap));
    let cards = array(&config["net"]).filter(|card| !own(&card["id"]));
    let cards = cards.filter_map(|card| {
        let id = card["id"].as_str().unwrap_or("without id");
        match (card["tap"].as_str(), array(&card["fds"]).count()) {
            (Some(tap), _) => Some(format!("TAP device {tap} of network device {id}")),
            (None, 0) => None,
            (None, _) => Some(format!("the descriptors of network device {id}")),
        }
    });
    let disks = disks.map(|path| format!("disk {path}"));
    disks.chain(pmem.map(|path| format!("persistent memory {path}"))).chain(cards).collect()
}

/// Sets the TAP device of each network device in `taps`.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if there is no such network device.
pub(super) fn set_taps(config: &mut Value, taps: &[(String, String)]) -> Result<()> {
    for (id, tap) in taps {
        // The member is not read by index: an index panics for a document that is no object.
        let mut cards = config.get_mut("net").and_then(Value::as_array_mut).into_iter().flatten();
        let card = cards.find(|card| card["id"] == id.as_str()).and_then(Value::as_object_mut);
        let Some(card) = card else {
            let ids: Vec<_> = array(&config["net"]).filter_map(|card| card["id"].as_str()).collect();
            let ids = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            return Err(Error::usage(format!("the snapshot has no network device '{id}'"))
                .hint(format!("network devices of the snapshot: {ids}")));
        };
        card.insert("tap".to_owned(), json!(tap));
        // A restore would give the TAP device the MAC address of the source VM's TAP device, and would expect
        // descriptors.
        card.remove("host_mac");
        card.remove("fds");
    }
    Ok(())
}

/// Writes the output of terminals to logs in `dir`: a clone has no terminal.
pub(super) fn log_terminals(config: &mut Value, dir: &str) {
    for (name, device) in OUTPUTS {
        if let Some("Tty" | "Pty") = config[name]["mode"].as_str() {
            config[name]["mode"] = json!("File");
            config[name]["file"] = json!(format!("{dir}/{device}.log"));
        }
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
