//! Cloud Hypervisor: the files that `stencil args` writes for a clone, from snapshots of three versions.

#[cfg(cloud_hypervisor)]
mod launch;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde_json::{Value, json};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;
use crate::support::vm::cloud_hypervisor::{Region, VERSIONS, Version, anonymous, config, state, zones};

const MIB: u64 = 1 << 20;
/// Where memory begins again above the hole for devices.
const HIGH: u64 = 4 << 30;

/// A name, the memory of the configuration, its regions, and which of them are in the file `memory-ranges`.
type Case = (&'static str, Value, [Region<'static>; 2], &'static [usize]);

/// Imports a snapshot whose memory file contains the regions in this order.
fn import(world: &TestMount, name: &str, bytes: &[u8], [config, state]: [&Value; 2]) {
    let path = |file: &str| world.dir().join(format!("{name}.{file}")).display().to_string();
    fs::write(path("memory"), bytes).unwrap();
    fs::write(path("config"), config.to_string()).unwrap();
    fs::write(path("state"), state.to_string()).unwrap();
    let files = ["config", "state"].map(|file| format!("{file}.json={},kind=blob", path(file)));
    world.stencil(&["import", &path("memory"), name, "--file", &files[0], "--file", &files[1]]).ok();
}

fn directory(world: &TestMount, name: &str) -> String {
    let dir = world.dir().join(name);
    fs::create_dir(&dir).unwrap();
    dir.display().to_string()
}

fn args(world: &TestMount, template: &str, dir: &str) -> Value {
    world.json(&["args", template, "--vmm", "cloud-hypervisor", "--dir", dir])
}

fn written(dir: &str, name: &str) -> Value {
    serde_json::from_slice(&fs::read(Path::new(dir).join(name)).unwrap()).unwrap()
}

/// Returns the memory manager's state, and takes it out of `state.json`.
fn take_memory_manager(state: &mut Value) -> Value {
    let text = state["snapshots"]["memory-manager"]["snapshot_data"]["state"].take();
    serde_json::from_str(text.as_str().unwrap()).unwrap()
}

/// Reads guest memory as Cloud Hypervisor maps it: `restore_memory_regions_and_zones` and `open_backing_file` in
/// `vmm/src/memory_manager.rs` of version 51.
fn restored(config: &Value, manager: &Value, (_, gpa, size, _): Region<'_>) -> Vec<u8> {
    assert_eq!(config["memory"]["size"], 0, "memory without zones is anonymous");
    assert_eq!(manager["memory_ranges"], json!({"data": []}), "these ranges are copied");
    let mappings = manager["guest_ram_mappings"].as_array().unwrap();
    let mapping = mappings.iter().find(|mapping| mapping["gpa"] == gpa).unwrap();
    let zone =
        config["memory"]["zones"].as_array().unwrap().iter().find(|z| z["id"] == mapping["zone_id"]).unwrap();
    for option in ["shared", "hugepages", "prefault", "hugepage_size", "host_numa_node"] {
        assert!(zone[option].is_null() || zone[option] == false, "{option}: {zone}");
    }
    assert_eq!(mapping["size"], size);
    let mut bytes = vec![0; size as usize];
    let file = File::open(zone["file"].as_str().unwrap()).unwrap();
    file.read_exact_at(&mut bytes, mapping["file_offset"].as_u64().unwrap()).unwrap();
    bytes
}

#[test]
fn clone_directories_of_three_versions_map_the_template() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let low = guest_like(1, 8 * MIB as usize);
    let high = guest_like(2, 4 * MIB as usize);
    for version in VERSIONS {
        let file = format!("/dev/shm/{version:?}");
        let cases: [Case; 4] = [
            (
                "anonymous",
                anonymous(version, 12 * MIB),
                [("mem0", 0, 8 * MIB, 0), ("mem0", HIGH, 4 * MIB, 0)],
                &[0, 1],
            ),
            // The manager keeps zones in a hash map, so that they are saved in any order.
            (
                "zones",
                zones(version, &[("a", 8 * MIB, None), ("b", 4 * MIB, None)]),
                [("a", 0, 8 * MIB, 0), ("b", HIGH, 4 * MIB, 0)],
                &[1, 0],
            ),
            (
                "shared",
                {
                    let mut memory = anonymous(version, 12 * MIB);
                    memory["shared"] = json!(true);
                    memory["prefault"] = json!(true);
                    memory
                },
                [("mem0", 0, 8 * MIB, 0), ("mem0", HIGH, 4 * MIB, 8 * MIB)],
                &[0, 1],
            ),
            (
                "file",
                zones(version, &[("m0", 12 * MIB, Some(&file))]),
                [("m0", 0, 8 * MIB, 0), ("m0", HIGH, 4 * MIB, 8 * MIB)],
                &[],
            ),
        ];
        for (case, memory, regions, saved) in cases {
            let name = format!("{}-{case}", format!("{version:?}").to_lowercase());
            let source = config(version, memory);
            let saved: Vec<Region> = saved.iter().map(|number| regions[*number]).collect();
            let mut source_state = state(&regions, &saved);
            let bytes = if saved.first() == Some(&regions[1]) {
                [&high[..], &low].concat()
            } else {
                [&low[..], &high].concat()
            };
            import(&world, &name, &bytes, [&source, &source_state]);
            let dir = directory(&world, &format!("clone {name}"));
            let output = args(&world, &name, &dir);
            assert_eq!(output["files"], json!([format!("{dir}/config.json"), format!("{dir}/state.json")]));
            assert_eq!(output["argv"][4], format!("source_url=file://{dir}"));
            let removed =
                output["notes"][0].as_str().unwrap().ends_with("share memory: shared=on, prefault=on");
            assert_eq!(removed, case == "shared", "{name}: {output}");

            let (mut config, mut state) = (written(&dir, "config.json"), written(&dir, "state.json"));
            let manager = take_memory_manager(&mut state);
            for (region, expected) in regions.into_iter().zip([&low, &high]) {
                assert!(
                    restored(&config, &manager, region) == *expected,
                    "{name}: memory at {:#x}",
                    region.1
                );
            }
            assert_eq!(config["vsock"]["socket"], format!("{dir}/vsock.sock"));
            assert_eq!(config["serial"]["file"], format!("{dir}/serial.log"));

            // Nothing else has changed.
            let mut before = take_memory_manager(&mut source_state);
            assert_eq!(state, source_state, "{name}");
            for (key, value) in [("memory_ranges", Value::Null), ("guest_ram_mappings", Value::Null)] {
                before[key] = value;
            }
            let mut after = manager.clone();
            after["memory_ranges"] = Value::Null;
            for mapping in after["guest_ram_mappings"].take().as_array().unwrap() {
                let keys: Vec<&str> = mapping.as_object().unwrap().keys().map(String::as_str).collect();
                assert_eq!(keys.len(), 6, "{name}: {keys:?}");
            }
            assert_eq!(after, before, "{name}");
            config["memory"] = source["memory"].clone();
            config["vsock"]["socket"] = source["vsock"]["socket"].clone();
            config["serial"]["file"] = source["serial"]["file"].clone();
            assert_eq!(config, source, "{name}");
        }
    }
}

#[test]
fn a_launch_that_cannot_succeed_is_refused_and_leaves_nothing() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let regions = [("mem0", 0, MIB, 0)];
    let mut config = config(Version::V51, anonymous(Version::V51, MIB));
    let state = state(&regions, &regions);
    let bytes = guest_like(3, MIB as usize);
    import(&world, "disk", &bytes, [&config, &state]);
    let launch = |template: &str, more: &[&str]| {
        world.stencil(&[&["clone", template, "--cloud-hypervisor", "/bin/false"], more].concat())
    };
    launch("disk", &["-n", "2"]).exits(2).says("each would write to disk /var/lib/web.raw");
    config["disks"][0]["readonly"] = json!(true);
    import(&world, "tap", &bytes, [&config, &state]);
    let network = config["net"][0]["id"].as_str().unwrap();
    launch("tap", &["-n", "2"])
        .exits(2)
        .says(&format!("each would write to TAP device tap0 of network device {network}"));
    launch("tap", &["--network", "other=tap-{index}"]).exits(2).says("no network device 'other'");
    launch("tap", &["--jailer", "/bin/true", "--uid", "1", "--gid", "1"])
        .exits(2)
        .says("--jailer does not apply");
    let own = format!("{network}=tap-{{index}}");
    launch("tap", &["-n", "2", "--network", &own]).exits(1).says("exited before it opened its API socket");
    assert_eq!(world.json(&["ps"])["clones"], json!([]));
    for directory in ["clones", "launches"] {
        let left = fs::read_dir(world.runtime_dir().join(directory)).into_iter().flatten().count();
        assert_eq!(left, 0, "{directory}");
    }
}

#[test]
fn files_of_a_clone_are_private_and_not_replaced_by_mistake() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let regions = [("mem0", 0, MIB, 0)];
    let [config, state] = [config(Version::V51, anonymous(Version::V51, MIB)), state(&regions, &regions)];
    import(&world, "web", &guest_like(3, MIB as usize), [&config, &state]);
    let dir = directory(&world, "clone");
    let words = ["args", "web", "--vmm", "cloud-hypervisor", "--dir", &dir];
    let run = world.stencil(&words).ok();
    assert!(run.out.ends_with(&format!("--restore source_url=file://{dir}\n")), "{}", run.out);
    for note in [
        "each clone opens the same host resources as the source VM: path /var/lib/web.raw of disks, tap tap0 of net",
        "51 or later",
    ] {
        assert!(run.err.contains(note), "{}", run.err);
    }
    let files = ["config.json", "state.json"].map(|name| Path::new(&dir).join(name));
    assert!(files.iter().all(|file| fs::metadata(file).unwrap().mode() & 0o7777 == 0o600));

    fs::write(&files[1], "mine").unwrap();
    fs::remove_file(&files[0]).unwrap();
    world.stencil(&words).exits(1).says("refusing to replace an existing file");
    assert!(!files[0].exists() && fs::read(&files[1]).unwrap() == b"mine", "a file was written");
    let outside = world.dir().join("outside");
    fs::rename(&files[1], &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &files[1]).unwrap();
    world.stencil(&[&words[..], &["--force"]].concat()).ok();
    assert!(fs::symlink_metadata(&files[1]).unwrap().is_file(), "the link is replaced, not followed");
    assert_eq!(fs::read(&outside).unwrap(), b"mine");

    world.stencil(&words[..4]).exits(2).says("missing option --dir");
    world.stencil(&[&words[..5], &["/nowhere"]].concat()).exits(4).says("cannot access directory");
    world.stencil(&["args", "web", "--vmm", "qemu", "--dir", &dir]).exits(2).says("--dir has no effect");
    let mut other = state;
    other["snapshots"]["memory-manager"] = Value::Null;
    import(&world, "other", &guest_like(3, MIB as usize), [&config, &other]);
    world
        .stencil(&["args", "other", "--vmm", "cloud-hypervisor", "--dir", &dir, "--force"])
        .exits(2)
        .says("state.json has no memory manager");
}
