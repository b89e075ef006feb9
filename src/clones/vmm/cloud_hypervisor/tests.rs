use serde_json::json;

use super::super::tests::served;
use super::*;
use crate::store::FileKind::{Blob, Ram};

const MIB: u64 = 1 << 20;

/// Ranges and mappings as in [`snapshot`], and words of the refusal.
type Case = (&'static [(u64, u64)], &'static [(u64, u64, u64)], &'static str);

/// A snapshot of 64 MiB in the memory manager's ranges and mappings: (guest address, length) and (guest address, size,
/// offset in the file), all in MiB.
fn snapshot(config: &Value, ranges: &[(u64, u64)], mappings: &[(u64, u64, u64)]) -> Served {
    let ranges: Vec<_> =
        ranges.iter().map(|(gpa, length)| json!({"gpa": gpa * MIB, "length": length * MIB})).collect();
    let mapping = |(gpa, size, offset): &(u64, u64, u64)| {
        json!({"slot": 0, "gpa": gpa * MIB, "size": size * MIB, "zone_id": "mem0", "virtio_mem": false,
               "file_offset": offset * MIB})
    };
    let mappings: Vec<_> = mappings.iter().map(mapping).collect();
    let manager = json!({"memory_ranges": {"data": ranges}, "guest_ram_mappings": mappings, "next_memory_slot": 1,
                         "start_of_device_area": u64::MAX - 1});
    let manager = json!({"snapshots": {}, "snapshot_data": {"state": manager.to_string()}});
    let state = json!({"snapshots": {"memory-manager": manager}, "snapshot_data": {"state": "{}"}});
    let mut template =
        served(&[("memory-ranges", Ram, 64), ("config.json", Blob, 1), ("state.json", Blob, 1)]);
    template.clone_dir = Some("/run/web 7".to_owned());
    for (name, json) in FILES.into_iter().zip([config, &state]) {
        template.documents.insert(name.to_owned(), json.to_string().into_bytes());
    }
    template
}

fn anonymous() -> Value {
    json!({"memory": {"size": 64 * MIB, "thp": false}})
}

fn written(template: &Served) -> (Value, Value, VmmArguments) {
    let arguments = paste(template).unwrap();
    let parse = |number: usize| serde_json::from_slice::<Value>(&arguments.files[number].1).unwrap();
    let (config, state) = (parse(0), parse(1));
    let text = state["snapshots"]["memory-manager"]["snapshot_data"]["state"].as_str().unwrap();
    (config, serde_json::from_str(text).unwrap(), arguments)
}

fn refusal(template: &Served) -> String {
    paste(template).unwrap_err().to_string()
}

#[test]
fn anonymous_memory_becomes_a_zone_with_offsets_in_the_order_of_the_ranges() {
    let template = snapshot(&anonymous(), &[(4096, 48), (0, 16)], &[(0, 16, 0), (4096, 48, 0)]);
    let (config, manager, arguments) = written(&template);
    let zone =
        json!({"id": "mem0", "size": 64 * MIB, "file": "/mnt/by-id/abc/memory-ranges", "shared": false});
    assert_eq!(config["memory"], json!({"size": 0, "thp": true, "zones": [zone]}));
    assert_eq!(manager["memory_ranges"], json!({"data": []}));
    let offsets: Vec<_> = manager["guest_ram_mappings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["file_offset"].as_u64().unwrap())
        .collect();
    assert_eq!(offsets, [48 * MIB, 0]);
    assert_eq!(
        manager["start_of_device_area"],
        u64::MAX - 1,
        "a field that does not concern memory has changed"
    );
    assert_eq!(arguments.argv.unwrap().last().unwrap(), "source_url=file:///run/web 7");
    assert!(arguments.text.contains("--restore 'source_url=file:///run/web 7'"), "{}", arguments.text);
    assert_eq!(arguments.files[0].0, Path::new("/run/web 7/config.json"));
}

#[test]
fn a_zone_in_a_file_keeps_its_offsets_and_becomes_private() {
    let zone =
        json!({"id": "mem0", "size": 64 * MIB, "file": "/dev/shm/m", "shared": true, "prefault": false});
    let config = json!({"memory": {"size": 0, "zones": [zone]}});
    let (config, manager, arguments) = written(&snapshot(&config, &[], &[(0, 16, 0), (4096, 48, 16)]));
    let zone = &config["memory"]["zones"][0];
    assert_eq!((&zone["shared"], &zone["file"]), (&json!(false), &json!("/mnt/by-id/abc/memory-ranges")));
    assert_eq!(manager["guest_ram_mappings"][1]["file_offset"], 16 * MIB);
    assert!(!arguments.notes.iter().any(|note| note.starts_with("removed")), "{:?}", arguments.notes);
}

#[test]
fn options_without_sharing_are_removed_and_named() {
    let config = json!({"memory": {"size": 64 * MIB, "shared": true, "hugepages": true, "hugepage_size": 2 * MIB,
                                   "prefault": true, "reserve": true}});
    let (config, _, arguments) = written(&snapshot(&config, &[(0, 64)], &[(0, 64, 0)]));
    let memory = config["memory"].as_object().unwrap();
    let mut keys: Vec<_> = memory.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["reserve", "size", "thp", "zones"]);
    assert_eq!(memory["zones"][0]["reserve"], true);
    assert!(arguments.notes[0].ends_with("shared=on, hugepages=on, prefault=on"), "{:?}", arguments.notes);
}

#[test]
fn sockets_and_logs_are_in_the_directory_of_the_clone() {
    let mut config = anonymous();
    for (key, value) in [
        ("serial", json!({"mode": "File", "file": "/old/serial"})),
        ("console", json!({"mode": "Socket", "socket": "/old/console"})),
        ("debug_console", json!({"mode": "Pty", "file": "/dev/pts/4"})),
        ("vsock", json!({"cid": 3, "socket": "/old/vsock"})),
        ("disks", json!([{"path": "/d.raw", "readonly": false, "vhost_user": false}])),
        ("net", json!([{"tap": "tap4"}, {"tap": null}])),
        ("balloon", json!({"size": 0})),
    ] {
        config[key] = value;
    }
    let (config, _, arguments) = written(&snapshot(&config, &[(0, 64)], &[(0, 64, 0)]));
    assert_eq!(config["serial"]["file"], "/run/web 7/serial.log");
    assert_eq!(config["console"]["socket"], "/run/web 7/console.sock");
    assert_eq!(config["debug_console"]["file"], "/dev/pts/4");
    assert_eq!(config["vsock"], json!({"cid": 3, "socket": "/run/web 7/vsock.sock"}));
    for note in ["path /d.raw of disks, tap tap4 of net", "balloon frees no memory"] {
        assert!(arguments.notes.iter().any(|line| line.contains(note)), "{:?}", arguments.notes);
    }
}

#[test]
fn a_launched_clone_has_its_own_taps_and_writes_terminals_to_logs() {
    let mut config = anonymous();
    for (key, value) in [
        ("serial", json!({"mode": "Tty"})),
        ("console", json!({"mode": "Pty", "file": "/dev/pts/4"})),
        ("debug_console", json!({"mode": "Off"})),
        (
            "net",
            json!([
                {"id": "a", "tap": "tap4", "host_mac": "2e:89:a8:e4:92:b6"},
                {"id": "b", "tap": "tap5", "host_mac": "2e:89:a8:e4:92:b7"},
                {"id": "c", "tap": null, "fds": [3]},
            ]),
        ),
        (
            "disks",
            json!([{"path": "/d.raw", "readonly": true}, {"path": "/e.raw", "readonly": false}, {"path": "f.raw"}]),
        ),
        ("pmem", json!([{"file": "/p", "discard_writes": true}, {"file": "/q"}])),
    ] {
        config[key] = value;
    }
    let template = snapshot(&config, &[(0, 64)], &[(0, 64, 0)]);
    let taps = |of: &[(&str, &str)]| {
        of.iter().map(|(id, tap)| (id.to_string(), tap.to_string())).collect::<Vec<_>>()
    };
    let files = clone_files(&template, Path::new("/run/c1"), &taps(&[("b", "tap-7")])).unwrap();
    let written: Value = serde_json::from_slice(&files[0].1).unwrap();
    assert_eq!(written["serial"], json!({"mode": "File", "file": "/run/c1/serial.log"}));
    assert_eq!(written["console"], json!({"mode": "File", "file": "/run/c1/console.log"}));
    assert_eq!(written["debug_console"], json!({"mode": "Off"}));
    assert_eq!(written["net"][0]["host_mac"], "2e:89:a8:e4:92:b6");
    assert_eq!(written["net"][1], json!({"id": "b", "tap": "tap-7"}), "the TAP device keeps its MAC address");

    let check =
        |of: &[(&str, &str)], count| check_launch(&template, &taps(of), count).map_err(|e| e.to_string());
    assert!(check(&[("d", "tap")], 1).unwrap_err().contains("no network device 'd'"));
    assert!(check(&[], 2).unwrap_err().ends_with("each would write to disk /e.raw"));
    assert_eq!(check(&[], 1), Ok(vec![]));
    let rest = config::written(&config, &taps(&[("a", "tap-{index}"), ("b", "tap0")]));
    assert_eq!(
        rest[1..],
        [
            "persistent memory /q",
            "TAP device tap5 of network device b",
            "the descriptors of network device c"
        ]
    );
}

#[test]
fn a_foreign_config_is_an_error() {
    for foreign in ["[]", "7", "{}", r#"{"net": [1, null]}"#] {
        let mut template = snapshot(&anonymous(), &[(0, 64)], &[(0, 64, 0)]);
        template.documents.insert(FILES[0].to_owned(), foreign.into());
        let error = check_launch(&template, &[("a".into(), "tap".into())], 2).unwrap_err();
        assert_eq!(error.code(), crate::error::Code::Usage, "{foreign}: {error}");
    }
}

#[test]
fn devices_and_memory_that_cannot_be_cloned_are_refused_by_name() {
    for (key, value, words) in [
        ("fs", json!([{"tag": "t"}]), "device 'fs'"),
        (
            "disks",
            json!([{"vhost_user": true}]),
            "device 'disks' of the snapshot cannot be made for a clone: it needs shared",
        ),
        (
            "devices",
            json!([{"path": "/sys/d"}]),
            "device 'devices' of the snapshot cannot be made for a clone: it pins",
        ),
        ("tpm", json!({"socket": "/t"}), "device 'tpm'"),
        ("memory", json!({"size": 64 * MIB, "hotplug_size": MIB}), "hotplug_size"),
        ("memory", json!({"size": 0, "zones": [{"id": "mem0", "hotplug_size": MIB}]}), "hotplug_size"),
        ("memory", json!([]), "config.json has no memory"),
        ("memory", json!({"size": 0}), "is not in config.json"),
    ] {
        let mut config = anonymous();
        config[key] = value;
        let refused = refusal(&snapshot(&config, &[(0, 64)], &[(0, 64, 0)]));
        assert!(refused.starts_with("template web:1: ") && refused.contains(words), "{key}: {refused}");
    }
    let mut none = anonymous();
    none["fs"] = json!([]);
    none["tpm"] = json!(null);
    paste(&snapshot(&none, &[(0, 64)], &[(0, 64, 0)])).unwrap();
}

#[test]
fn a_memory_file_of_another_state_is_refused() {
    let cases: [Case; 6] = [
        (&[(0, 32)], &[(0, 32, 0)], "has 67108864 bytes, but the mappings in the state end at byte 33554432"),
        (&[(0, 128)], &[(0, 128, 0)], "end at byte 134217728"),
        (&[], &[(0, 65, 0)], "end at byte 68157440"),
        (&[(0, 64)], &[(0, 32, 0), (60, 8, 0)], "contain no whole copy of memory"),
        (&[(0, 64)], &[(64, 8, 0)], "contain no whole copy of memory"),
        (&[(0, u64::MAX / MIB)], &[(u64::MAX / MIB, 1, 0)], "contain no whole copy"),
    ];
    for (ranges, mappings, words) in cases {
        let refused = refusal(&snapshot(&anonymous(), ranges, mappings));
        assert!(refused.contains(words), "{ranges:?}: {refused}");
    }
    let zone = |id: &str| json!({"id": id, "size": 32 * MIB});
    let two = json!({"memory": {"size": 0, "zones": [zone("mem0"), zone("b")]}});
    assert!(refusal(&snapshot(&two, &[], &[(0, 64, 0)])).contains("is in 2 files"));
}

#[test]
fn files_that_cloud_hypervisor_did_not_write_are_refused() {
    let template = snapshot(&anonymous(), &[(0, 64)], &[(0, 64, 0)]);
    for (name, bytes, words) in [
        ("state.json", "{", "cannot parse file 'state.json'"),
        ("state.json", "[]", "state.json has no memory manager"),
        (
            "state.json",
            r#"{"snapshots": {"memory-manager": {"snapshot_data": {"state": "[]"}}}}"#,
            "cannot parse the memory manager",
        ),
        ("config.json", "[]", "config.json has no memory"),
    ] {
        let mut template = template.clone();
        template.documents.insert(name.to_owned(), bytes.as_bytes().to_vec());
        assert!(refusal(&template).contains(words), "{name} {bytes}: {}", refusal(&template));
    }
    let mut without = template.clone();
    without.documents.remove("config.json");
    assert!(refusal(&without).contains("has no file 'config.json'"));
    let mut without = template.clone();
    without.clone_dir = None;
    assert!(refusal(&without).contains("missing option --dir"));
    let mut comma = template;
    comma.clone_dir = Some("/run/a,b".to_owned());
    assert!(refusal(&comma).contains("invalid directory '/run/a,b'"));
}
