//! Cloud Hypervisor: the files that `stencil args` writes for a clone, from snapshots of three versions; and a launch
//! of the real program, where one is named.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;
use crate::support::vm::cloud_hypervisor::{Region, VERSIONS, Version, anonymous, config, state, zones};
use crate::support::vm::guest::patiently;

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
        "unchanged, and opened by each clone: path /var/lib/web.raw of disks, tap tap0 of net",
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

    world.stencil(&words[..4]).exits(2).says("missing directory");
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

/// A guest that Cloud Hypervisor boots by its PVH entry, in 32-bit mode without paging. It fills 256 pages from 8 MiB
/// with known words and prints `B`; then, again and again, it writes 64 pages from 16 MiB, checks the known words, and
/// prints `.` if they are right and `X` if not.
const GUEST: &str = r#"
.section .note.pvh, "a", @note
.long 4, 8, 18
.asciz "Xen"
.quad 0x200000
.text
.code32
.globl _start
_start:
    mov $0x800000, %edi
    mov $0xa5000000, %eax
1:  mov %eax, (%edi)
    add $4096, %edi
    inc %eax
    cmp $0x900000, %edi
    jb 1b
    mov $0x3f8, %dx
    mov $'B', %al
    out %al, %dx
2:  mov $0x1000000, %edi
3:  incl (%edi)
    add $4096, %edi
    cmp $0x1040000, %edi
    jb 3b
    mov $0x800000, %edi
    mov $0xa5000000, %ecx
    mov $'.', %al
4:  cmp %ecx, (%edi)
    je 5f
    mov $'X', %al
5:  add $4096, %edi
    inc %ecx
    cmp $0x900000, %edi
    jb 4b
    out %al, %dx
    mov $300000, %ecx
6:  pause
    loop 6b
    jmp 2b
"#;

/// Sends a request to Cloud Hypervisor's API.
fn put(socket: &Path, action: &str, body: &str) {
    let mut stream =
        patiently("the API socket", Duration::from_secs(30), || UnixStream::connect(socket).ok());
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let length = body.len();
    let headers = "Host: localhost\r\nAccept: */*\r\nContent-Type: application/json";
    write!(stream, "PUT /api/v1/{action} HTTP/1.1\r\n{headers}\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("HTTP/1.1 20"), "{action}: {answer}");
}

/// Where KVM cannot save nested state, as KVM_PVM cannot, Cloud Hypervisor takes no snapshot.
#[test]
#[ignore = "launches the Cloud Hypervisor that STENCIL_CLOUD_HYPERVISOR names"]
fn four_clones_resume_in_the_real_cloud_hypervisor() {
    let _host = host::shared();
    let binary = std::env::var("STENCIL_CLOUD_HYPERVISOR").expect("STENCIL_CLOUD_HYPERVISOR names no binary");
    let world = TestMount::new("auto");
    let path = |name: &str| world.dir().join(name);
    fs::write(path("guest.S"), GUEST).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-nostdlib", "-static", "-Wl,-Ttext=0x200000,--build-id=none", "-o"]);
    assert!(compiler.arg(path("guest")).arg(path("guest.S")).status().unwrap().success());
    let start = |words: &[&str]| {
        let mut command = Command::new(&binary);
        Running::start(command.args(words), &path("vmm.log"))
    };
    let serial = |file: &Path, text: &str| {
        patiently("the guest's output", Duration::from_secs(60), || {
            let read = fs::read_to_string(file).unwrap_or_default();
            assert!(!read.contains('X'), "the guest read a wrong word: {read}");
            read.contains(text).then_some(read)
        })
    };

    let [memory, socket, output] =
        ["memory", "source.sock", "source.log"].map(|name| path(name).display().to_string());
    for form in ["anonymous", "file"] {
        let zone = format!("id=m0,size=64M,file={memory},shared=on");
        let mut words = vec!["--api-socket", &socket, "--cpus", "boot=1", "--console", "off", "--kernel"];
        let (kernel, log) = (path("guest").display().to_string(), format!("file={output}"));
        words.extend([kernel.as_str(), "--serial", &log]);
        match form {
            "anonymous" => words.extend(["--memory", "size=64M"]),
            _ => {
                File::create(&memory).unwrap().set_len(64 * MIB).unwrap();
                words.extend(["--memory", "size=0", "--memory-zone", &zone]);
            }
        }
        let source = start(&words);
        serial(Path::new(&output), "B..");
        let snapshot = directory(&world, form);
        put(Path::new(&socket), "vm.pause", "");
        put(
            Path::new(&socket),
            "vm.snapshot",
            &json!({"destination_url": format!("file://{snapshot}")}).to_string(),
        );
        drop(source);
        let [config, state] = ["config.json", "state.json"].map(|name| written(&snapshot, name));
        let ranges = Path::new(&snapshot).join("memory-ranges");
        assert_eq!(ranges.exists(), form == "anonymous", "{form}");
        import(
            &world,
            form,
            &fs::read(if ranges.exists() { &ranges } else { Path::new(&memory) }).unwrap(),
            [&config, &state],
        );
        for file in [&memory, &socket, &output] {
            let _ = fs::remove_file(file);
        }

        let mut clones = vec![];
        for number in 0..4 {
            let dir = directory(&world, &format!("{form}-{number}"));
            let argv = args(&world, form, &dir)["argv"].clone();
            let words: Vec<&str> =
                argv.as_array().unwrap()[1..].iter().map(|word| word.as_str().unwrap()).collect();
            clones.push((start(&words), dir));
        }
        for (_, dir) in &clones {
            put(&Path::new(dir).join("api.sock"), "vm.resume", "");
        }
        for (_, dir) in &clones {
            let read = serial(&Path::new(dir).join("serial.log"), "..");
            assert!(!read.contains('B'), "the guest has booted instead of resuming: {read}");
        }
        let density = world.json(&["density"]);
        for (vmm, _) in &clones {
            let row = density["clones"].as_array().unwrap().iter().find(|row| row["pid"] == vmm.0.id());
            let row = row.unwrap_or_else(|| panic!("{form}: no clone in {density}"));
            let pages = row["dirty_pages"].as_u64().unwrap();
            assert_eq!(pages, 64, "{form}: {row}");
        }
    }
}
