//! Import of the directory that a VMM has written a snapshot into: recognition, and the same files back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::{Fixture, guest_like, random};
use crate::vmm::firecracker::state;

const MIB: usize = 1 << 20;

type Files<'a> = &'a [(&'a str, Vec<u8>)];

/// Writes a directory with these files.
fn folder(path: PathBuf, files: Files) -> PathBuf {
    fs::create_dir_all(&path).unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(path.join(name), bytes).unwrap());
    path
}

fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry =
        |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    fs::read_dir(path).unwrap().map(|e| entry(e.unwrap())).collect()
}

fn firecracker() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("snapshot.mem", guest_like(1, 4 * MIB)),
        ("snapshot.state", state(0x8664, "8.0.0", 2)),
        ("rootfs.img", random(3, 3 * MIB + 512)),
        ("empty", vec![]),
    ]
}

fn cloud_hypervisor() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("config.json", br#"{"memory":{"size":4194304}}"#.to_vec()),
        ("memory-ranges", guest_like(4, 4 * MIB)),
        ("state.json", br#"{"snapshots":{}}"#.to_vec()),
    ]
}

fn kata() -> Vec<(&'static str, Vec<u8>)> {
    vec![("memory", guest_like(5, 4 * MIB)), ("state", b"QEVM\0\0\0\x03 and so on".to_vec())]
}

#[test]
fn every_kind_of_folder_comes_back_byte_for_byte() {
    let fixture = Fixture::new();
    let others = json!(["empty", "rootfs.img"]);
    for (name, files, memory, recognized, line) in [
        (
            "fc",
            firecracker(),
            "snapshot.mem",
            json!({"vmm": "firecracker", "memory": "snapshot.mem", "state": "snapshot.state", "version": "8.0.0",
                "machine": "x86_64", "others": others}),
            "Firecracker snapshot: memory 'snapshot.mem', state 'snapshot.state' (version 8.0.0, x86_64); other files: \
             'empty', 'rootfs.img'",
        ),
        (
            "ch",
            cloud_hypervisor(),
            "memory-ranges",
            json!({"vmm": "cloud-hypervisor", "memory": "memory-ranges", "state": "state.json", "version": null,
                "machine": null, "others": ["config.json"]}),
            "Cloud Hypervisor snapshot: memory 'memory-ranges', state 'state.json'; other files: 'config.json'",
        ),
        (
            "kata",
            kata(),
            "memory",
            json!({"vmm": "kata", "memory": "memory", "state": "state", "version": null, "machine": null,
                "others": []}),
            "Kata template: memory 'memory', state 'state'",
        ),
    ] {
        let source = folder(fixture.path(name), &files);
        let source = source.to_str().unwrap();
        let text = fixture.run(&["import", source, name]).ok();
        assert_eq!(text.stdout.lines().nth(1), Some(line), "{text:?}");
        let report = fixture.run(&["import", source, name, "--json"]).ok().json();
        assert_eq!((&report["recognized"], &report["existed"]), (&recognized, &json!(true)), "{name}");
        for file in report["files"].as_array().unwrap() {
            let kind = if file["name"] == memory { "ram" } else { "blob" };
            assert_eq!(file["kind"], kind, "{name}: {file}");
        }

        let out = fixture.path(&format!("{name}.out"));
        fs::create_dir(&out).unwrap();
        fixture.run(&["export", name, out.to_str().unwrap()]).ok();
        assert!(contents(&out) == contents(Path::new(source)), "{name}");
        // Memory files are exported without holes: a hole does not change the length of a file, but a VMM may take a
        // hole for a page of another file.
        let allocated = |path: PathBuf| fs::metadata(path).unwrap().blocks() * 512;
        assert!(
            allocated(out.join(memory)) >= 4 * MIB as u64,
            "{name}: {} bytes",
            allocated(out.join(memory))
        );
        fixture.run(&["export", name, out.to_str().unwrap(), "--force", "--sparse"]).ok();
        assert!(contents(&out) == contents(Path::new(source)), "{name}");
        assert!(
            allocated(out.join(memory)) < 3 * MIB as u64,
            "{name}: {} bytes",
            allocated(out.join(memory))
        );
        // The memory needs no name.
        let single = fixture.path(&format!("{name}.single"));
        fixture.run(&["export", name, single.to_str().unwrap()]).ok();
        assert!(fs::read(single).unwrap() == contents(&out)[memory], "{name}");
    }
    fixture.assert_clean();
}

#[test]
fn a_cloud_hypervisor_folder_without_memory_takes_the_file_of_the_zone() {
    let fixture = Fixture::new();
    let mut files = cloud_hypervisor();
    let (_, memory) = files.remove(1);
    let source = folder(fixture.path("ch"), &files);
    let source = source.to_str().unwrap();
    let ran = fixture.run(&["import", source, "ch"]);
    assert!(ran.code == 2 && ran.stderr.contains("without 'memory-ranges'"), "{ran:?}");
    assert!(ran.stderr.contains("hint: add the file of the memory zone: --file NAME=PATH"), "{ran:?}");
    let zone = format!("m0={}", fixture.file("zone", &memory).display());
    let report = fixture.run(&["import", source, "ch", "--file", &zone, "--json"]).ok().json();
    let kinds: Vec<_> =
        report["files"].as_array().unwrap().iter().map(|f| (f["name"].clone(), f["kind"].clone())).collect();
    let kind = |name: &str, kind: &str| (Value::from(name), Value::from(kind));
    assert_eq!(kinds, [kind("config.json", "blob"), kind("m0", "ram"), kind("state.json", "blob")]);
    // In the directory itself the file would be taken for a blob.
    let inside = Path::new(source).join("m0");
    fs::rename(fixture.path("zone"), &inside).unwrap();
    let again = format!("m0={}", inside.display());
    let again = fixture.run(&["import", source, "ch", "--file", &again, "--json"]).ok().json();
    assert_eq!((&again["digest"], &again["existed"]), (&report["digest"], &json!(true)));
    fixture.assert_clean();
}

#[test]
fn each_directory_of_a_directory_becomes_a_tag() {
    let fixture = Fixture::new();
    let all = fixture.path("all");
    folder(all.join("v1"), &firecracker());
    folder(all.join("2024-05-01"), &kata());
    let source = all.to_str().unwrap();
    let ran = fixture.run(&["import", source, "web:1"]);
    assert!(ran.code == 2 && ran.stderr.contains("whose names become the tags"), "{ran:?}");
    let report = fixture.run(&["import", source, "web", "--label", "a=b", "--json"]).ok().json();
    let tags: Vec<_> = report["templates"].as_array().unwrap().iter().map(|t| t["tag"].clone()).collect();
    assert_eq!(tags, ["web:2024-05-01", "web:v1"]);
    assert_eq!(report["templates"][0]["recognized"]["vmm"], "kata");
    assert_eq!(fixture.run(&["inspect", "web:v1", "--json"]).ok().json()["labels"]["a"], "b");
    let out = fixture.path("out");
    fs::create_dir(&out).unwrap();
    fixture.run(&["export", "web:v1", out.to_str().unwrap()]).ok();
    assert!(contents(&out) == contents(&all.join("v1")));

    // All directories are checked before the first one is imported.
    for (name, files, message) in [
        ("_bad name", firecracker(), "invalid tag '_bad name'"),
        ("zz", vec![("x", vec![1])], "no snapshot found: the directory has 'x'"),
    ] {
        folder(all.join(name), &files);
        let ran = fixture.run(&["import", source, "other"]);
        assert!(ran.code == 2 && ran.stderr.contains(message) && ran.stderr.contains(name), "{ran:?}");
        assert_eq!(fixture.run(&["ls", "other"]).code, 4);
        fs::remove_dir_all(all.join(name)).unwrap();
    }
    folder(all.join("deep/v1"), &kata());
    let ran = fixture.run(&["import", source, "other"]);
    assert!(
        ran.code == 2 && ran.stderr.contains("expected a snapshot, found a directory of directories"),
        "{ran:?}"
    );
    fixture.assert_clean();
}

#[test]
fn refuses_by_name_what_is_no_part_of_a_snapshot() {
    let fixture = Fixture::new();
    let mut sockets = Vec::new();
    type Change<'a> = (&'a str, &'a str, Box<dyn FnMut(&Path) + 'a>);
    let write = |name: &'static str, bytes: Vec<u8>| {
        Box::new(move |path: &Path| fs::write(path.join(name), &bytes).unwrap()) as Box<dyn FnMut(&Path)>
    };
    let changes: Vec<Change> = vec![
        ("link", "a symbolic link", Box::new(|path| symlink("snapshot.mem", path.join("link")).unwrap())),
        (
            "v.sock",
            "a socket",
            Box::new(|path| sockets.push(UnixListener::bind(path.join("v.sock")).unwrap())),
        ),
        (
            "fifo",
            "a FIFO",
            Box::new(|path| mknodat(CWD, path.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap()),
        ),
        ("sub", "both files and directories", Box::new(|path| fs::create_dir(path.join("sub")).unwrap())),
        ("manifest.json", "invalid file name 'manifest.json'", write("manifest.json", vec![1])),
        (".hidden", "invalid file name '.hidden'", write(".hidden", vec![1])),
        (
            "old.state",
            "2 Firecracker state files, such as 'old.state'",
            write("old.state", state(0x8664, "8.0.0", 3)),
        ),
        ("twin", "'snapshot.mem' and 'twin' both have", write("twin", vec![1; 4 * MIB])),
        (
            "state",
            "'snapshot.state' is a Firecracker state file, and there is a file 'state'",
            write("state", vec![1]),
        ),
        (
            "snapshot.state",
            "'snapshot.mem', 'snapshot.state'",
            write("snapshot.state", b"no header of any VMM".to_vec()),
        ),
        ("snapshot.state", "damaged or incomplete", {
            let mut damaged = state(0x8664, "8.0.0", 2);
            damaged[2000] ^= 4;
            write("snapshot.state", damaged)
        }),
        ("snapshot.mem", "no memory file in 'empty'", write("snapshot.mem", vec![1; MIB + 4096])),
    ];
    for (number, (name, message, mut change)) in changes.into_iter().enumerate() {
        let source = folder(fixture.path(&number.to_string()), &firecracker());
        change(&source);
        let ran = fixture.run(&["import", source.to_str().unwrap(), "fc"]);
        assert!(ran.code == 2 && ran.stderr.contains(message), "{name}: {ran:?}");
        assert!(ran.stderr.contains(name) && ran.stderr.contains("hint: "), "{name}: {ran:?}");
    }
    let empty = folder(fixture.path("nothing"), &[]);
    let ran = fixture.run(&["import", empty.to_str().unwrap(), "fc"]);
    assert!(ran.code == 2 && ran.stderr.contains("the directory is empty"), "{ran:?}");
    let plain = folder(fixture.path("plain"), &kata());
    let plain = plain.to_str().unwrap();
    let ran = fixture.run(&["import", plain, "k", "--format", "firecracker"]);
    assert!(ran.code == 2 && ran.stderr.contains("has a Kata template"), "{ran:?}");
    let ran = fixture.run(&["import", plain, "k", "--state", plain]);
    assert!(ran.code == 2 && ran.stderr.contains("the source is a directory"), "{ran:?}");
    // The memory is named, so that nothing is ambiguous.
    let source = folder(fixture.path("named"), &firecracker());
    fs::write(source.join("twin"), vec![1; 4 * MIB]).unwrap();
    let twin = format!("twin={},kind=blob", source.join("twin").display());
    let report =
        fixture.run(&["import", source.to_str().unwrap(), "fc", "--file", &twin, "--json"]).ok().json();
    assert_eq!(report["recognized"]["memory"], "snapshot.mem");
    fixture.assert_clean();
}

/// Files under their own names are found by everything that needs the memory or the device state.
#[test]
fn memory_and_state_are_found_under_any_names() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let files = firecracker();
    let source = folder(world.dir().join("fc"), &files);
    world.stencil(&["import", source.to_str().unwrap(), "fc"]).ok();
    let body = world.json(&["args", "fc", "--vmm", "firecracker"])["body"].clone();
    for (path, name, number) in [
        (&body["mem_backend"]["backend_path"], "snapshot.mem", 0),
        (&body["snapshot_path"], "snapshot.state", 1),
    ] {
        let path = path.as_str().unwrap();
        assert!(path.ends_with(&format!("/{name}")), "{path}");
        assert!(fs::read(path).unwrap() == files[number].1, "{name}");
    }
    assert!(world.stencil(&["args", "fc", "--vmm", "qemu"]).ok().out.contains("/snapshot.mem"));
    // The template's directory in the mount has the files of the VMM's own directory.
    let served = world.stencil(&["path", "fc"]).ok().out;
    let mut served = contents(Path::new(served.trim()));
    served.remove("manifest.json").unwrap();
    assert!(served == contents(&source));
    // The placeholders of a command have the paths of the files.
    let told = world.dir().join("told");
    let script =
        format!("echo $1 $2 >{}; echo READY=1 >/proc/self/fd/$STENCIL_NOTIFY; exec sleep 60", told.display());
    let clone = ["clone", "fc", "--ready", "notify", "--", "sh", "-c", &script, "sh", "{memory}", "{state}"];
    world.stencil(&clone).ok();
    let text = fs::read_to_string(told).unwrap();
    let names: Vec<_> = text.split_whitespace().map(|path| Path::new(path).file_name().unwrap()).collect();
    assert_eq!(names, ["snapshot.mem", "snapshot.state"]);
    world.stencil(&["stop", "--all"]).ok();
    // A simulated clone maps the memory, and `dirty --bitmap` writes the pages of that file.
    let clone = world.json(&["clone", "fc", "--simulate", "read=10p,write=7p"]);
    let (id, bitmap) = (clone["clones"][0]["id"].as_str().unwrap(), world.dir().join("bitmap"));
    world.stencil(&["dirty", id, "--bitmap", bitmap.to_str().unwrap()]).ok();
    let bits: u32 = fs::read(bitmap).unwrap().iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(bits, 7);
    world.stencil(&["stop", "--all"]).ok();
}

/// The state is found by the first bytes of the blobs, and those of a disk may be damaged.
#[test]
fn a_damaged_disk_does_not_keep_the_memory_from_being_exported() {
    let fixture = Fixture::new();
    let disk = random(3, 2 * MIB);
    fixture.run(&["import", fixture.file("disk", &disk).to_str().unwrap(), "disk"]).ok();
    let [pack] = fixture.files("packs").try_into().unwrap();
    let mut files = firecracker();
    files[2].1 = disk;
    let source = folder(fixture.path("fc"), &files);
    let disk = format!("rootfs.img={},kind=blob", source.join("rootfs.img").display());
    fixture.run(&["import", source.to_str().unwrap(), "fc", "--file", &disk]).ok();
    let file = File::options().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 5000).unwrap();
    let out = fixture.path("out");
    fixture.run(&["export", "fc", out.to_str().unwrap()]).ok();
    assert!(fs::read(out).unwrap() == files[0].1);
    assert_eq!(fixture.run(&["verify"]).code, 3);
}

/// The kernel's limit of open files is lower than the number of files in all directories together.
#[test]
fn a_directory_may_have_more_snapshots_than_files_can_be_open() {
    let fixture = Fixture::new();
    let all = fixture.path("all");
    for number in 0..30 {
        folder(all.join(format!("v{number}")), &[("memory", random(number, 8192)), ("state", vec![1])]);
    }
    let script =
        format!("ulimit -n 40 && exec {} import {} many", env!("CARGO_BIN_EXE_stencil"), all.display());
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .env("STENCIL_STORE", fixture.path("store"))
        .env("STENCIL_RUNTIME_DIR", fixture.path("run"))
        .stderr(File::create(fixture.path("err")).unwrap())
        .status()
        .unwrap();
    assert!(output.success(), "{}", fs::read_to_string(fixture.path("err")).unwrap());
    let listed = fixture.run(&["ls", "many", "--json"]).ok().json();
    assert_eq!(listed["templates"].as_array().unwrap().len(), 30);
}
