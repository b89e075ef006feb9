//! The output of `stencil args` is executed as printed: by QEMU, by libvirt, and by Kata's script; the body for
//! Firecracker is checked against its published API.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::clones::migration::{Settings, wait_end};
use stencilfs::clones::qmp::Qmp;

use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, run};
use crate::support::store::guest_like;
use crate::support::vm::guest::{self, Qemu, heartbeats, linux, patiently, qemu_words};
use crate::support::vm::libvirt::Domain;
use crate::vmm::firecracker::state;

const MIB: usize = 1 << 20;

impl Running {
    fn shell(world: &TestMount, text: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec {text}")]).current_dir(world.dir());
        Running::start(&mut command, &world.dir().join("qemu.log"))
    }
}

/// A mount of the scenario's store at another mount point; unmounted on drop.
struct OtherMount<'a>(&'a TestMount, &'a Path);

impl<'a> OtherMount<'a> {
    fn mount(world: &'a TestMount, place: &'a Path) -> OtherMount<'a> {
        world.stencil(&["mount", place.to_str().unwrap()]).ok();
        OtherMount(world, place)
    }
}

impl Drop for OtherMount<'_> {
    fn drop(&mut self) {
        let run = self.0.stencil(&["umount", "--force", self.1.to_str().unwrap()]);
        assert!(run.code == 0 || std::thread::panicking(), "{}", run.err);
    }
}

/// Returns the mappings of a process from `density` and `/proc`: file, protection, length in MiB.
fn mappings(world: &TestMount, qemu: &mut Running) -> Vec<(String, String, u64)> {
    let pid = qemu.0.id();
    mappings_of(world, qemu, pid)
}

/// Same as [`mappings`] for process `pid`, which `parent` has started.
fn mappings_of(world: &TestMount, parent: &mut Running, pid: u32) -> Vec<(String, String, u64)> {
    let look = || {
        let log = fs::read_to_string(world.dir().join("qemu.log")).unwrap_or_default();
        assert!(parent.0.try_wait().unwrap().is_none(), "QEMU exited: {log}");
        let density = world.json(&["density"]);
        let clones = density["clones"].as_array().unwrap();
        let clone = clones.iter().find(|c| c["pid"] == pid)?.clone();
        (clone["private_bytes"].as_u64().unwrap() > 0).then_some(clone)
    };
    let clone = patiently("a guest that writes to its memory", Duration::from_secs(60), look);
    let lines = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let protection = |start: u64| {
        let line = lines.lines().find(|l| l.starts_with(&format!("{start:x}-"))).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().to_owned()
    };
    // QEMU maps the initrd as well.
    let maps = clone["maps"].as_array().unwrap().iter().filter(|m| m["file"] != "initrd");
    let mut maps: Vec<_> = maps
        .map(|m| {
            let start = m["start"].as_u64().unwrap();
            assert!(start.is_multiple_of(2 << 20) || m["file"] == "odd", "not aligned to 2 MiB: {m}");
            (
                m["file"].as_str().unwrap().to_owned(),
                protection(start),
                m["length"].as_u64().unwrap() / MIB as u64,
            )
        })
        .collect();
    maps.sort();
    maps
}

/// Returns what `explain` advises about each memory object of a printed command line.
fn advice(world: &TestMount, line: &str) -> Vec<String> {
    let mut advice = vec![];
    let objects = line.lines().filter_map(|line| line.trim().strip_prefix("-object "));
    for object in objects.filter(|object| object.contains("memory-backend-")) {
        let command = format!("{STENCIL} --json explain {}", object.trim_end_matches(" \\"));
        let output = Command::new("sh").args(["-c", &command]).current_dir(world.dir()).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
        let notes = reply["notes"].as_array().unwrap().iter();
        advice.extend(notes.filter_map(|note| Some(note["remedy"].as_str()?.to_owned())));
    }
    assert!(line.contains("-object "), "{line}");
    advice
}

fn import(world: &TestMount, tag: &str, files: &[(&str, usize, &str)]) {
    let mut words = vec!["import".to_owned()];
    for (number, (name, mib, kind)) in files.iter().enumerate() {
        let path = world.dir().join(format!("{name}.source"));
        fs::write(&path, guest_like(number as u64 + 7, mib * MIB)).unwrap();
        let path = path.display().to_string();
        match number {
            0 => words.extend([path, tag.to_owned()]),
            _ => words.extend(["--file".to_owned(), format!("{name}={path},kind={kind}")]),
        }
    }
    world.stencil(&words.iter().map(String::as_str).collect::<Vec<_>>()).ok();
}

fn text(world: &TestMount, template: &str, vmm: &str) -> String {
    let run = world.stencil(&["args", template, "--vmm", vmm]).ok();
    let json = world.json(&["args", template, "--vmm", vmm]);
    assert_eq!(json["text"].as_str().unwrap(), run.out.trim_end(), "text and JSON differ");
    assert!(json["notes"].as_array().unwrap().iter().all(|n| run.err.contains(n.as_str().unwrap())));
    run.out
}

#[test]
fn each_qemu_command_line_runs_as_printed() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        import(&world, "plain", &[("memory", 64, "ram")]);
        import(&world, "nodes", &[("memory", 64, "ram"), ("memory-n1", 32, "ram")]);
        import(&world, "rom", &[("memory", 64, "ram"), ("img", 6, "rom"), ("odd", 5, "rom")]);
        let file = |name: &str, protection: &str, mib| (name.to_owned(), protection.to_owned(), mib);
        for (template, expected) in [
            ("plain", vec![file("memory", "rw-p", 64)]),
            ("nodes", vec![file("memory", "rw-p", 64), file("memory-n1", "rw-p", 32)]),
            ("rom", vec![file("img", "r--s", 6), file("memory", "rw-p", 64), file("odd", "r--s", 5)]),
        ] {
            let line = text(&world, template, "qemu");
            assert_eq!(advice(&world, &line), Vec::<String>::new(), "{serve} {template}: {line}");
            let mut qemu = Running::shell(&world, &line);
            assert_eq!(mappings(&world, &mut qemu), expected, "{serve} {template}");
        }
    }
}

#[test]
fn the_line_of_a_captured_guest_has_its_options_and_quotes_paths() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    guest::give(&world);
    let place = world.dir().join("m,n it's");
    fs::create_dir(&place).unwrap();
    let mounted = OtherMount::mount(&world, &place);
    let line = text(&world, "guest:v1", "qemu");
    assert!(line.contains("id=ram0") && line.contains("memory-backend=ram0"), "{line}");
    assert!(line.contains("m,,n it'\\''s"), "{line}");
    assert_eq!(advice(&world, &line), Vec::<String>::new(), "{line}");
    let mut qemu = Running::shell(&world, &line);
    assert_eq!(mappings(&world, &mut qemu), [("memory".to_owned(), "rw-p".to_owned(), 256)]);
    drop(qemu);

    // Equivalent forms that QEMU accepts, and a form with which QEMU would use other memory.
    let recipe = world.stencil(&["inspect", "--recipe", "guest:v1"]).ok().out;
    let edited = world.dir().join("edited");
    let edit = |change: &dyn Fn(&str) -> String| {
        let mut recipe: Value = serde_json::from_str(&recipe).unwrap();
        for word in recipe["argv"].as_array_mut().unwrap() {
            *word = change(word.as_str().unwrap()).into();
        }
        fs::write(&edited, recipe.to_string()).unwrap();
        world.stencil(&["recipe", "edit", "guest:v1", "--from", edited.to_str().unwrap()])
    };
    edit(&|word| match word {
        "-machine" => "-M".to_owned(),
        word if word.starts_with("memory-backend-file,") => {
            let pairs = word.split(',').skip(1).map(|pair| pair.split_once('=').unwrap());
            let mut object: serde_json::Map<_, _> = pairs.map(|(k, v)| (k.to_owned(), json!(v))).collect();
            object.extend([
                ("qom-type".to_owned(), json!("memory-backend-file")),
                ("size".to_owned(), json!(256 * MIB)),
                ("share".to_owned(), json!(false)),
                ("readonly".to_owned(), json!(true)),
            ]);
            json!(object).to_string()
        }
        word => word.to_owned(),
    })
    .ok();
    let mut qemu = Running::shell(&world, &text(&world, "guest:v1", "qemu"));
    assert_eq!(mappings(&world, &mut qemu), [("memory".to_owned(), "rw-p".to_owned(), 256)]);
    drop(qemu);
    let refused = edit(&|word| word.replace(",memory-backend=ram0", "")).exits(2);
    refused.says("does not use RAM file 'memory'");

    let domain = text(&world, "guest:v1", "libvirt");
    let file = world.dir().join("domain.xml");
    fs::write(&file, &domain).unwrap();
    run("virt-xml-validate", &[file.to_str().unwrap(), "domain"]);
    drop(mounted);
    world.stencil(&["args", "guest:v1", "--vmm", "qemu"]).exits(4).says("the store is not mounted");
}

#[test]
fn the_libvirt_domain_is_valid_and_runs() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    import(&world, "rom", &[("memory", 64, "ram"), ("img", 6, "rom")]);
    let domain = text(&world, "rom", "libvirt");
    let file = world.dir().join("domain.xml");
    fs::write(&file, &domain).unwrap();
    run("virt-xml-validate", &[file.to_str().unwrap(), "domain"]);
    fs::write(&file, domain.replace("qemu:arg ", "qemu:argument ")).unwrap();
    let broken = Command::new("virt-xml-validate").arg(&file).arg("domain").output().unwrap();
    assert!(!broken.status.success(), "the schema accepts an unknown element");

    let words =
        domain.lines().filter_map(|line| line.trim().strip_prefix("<qemu:arg value='")?.strip_suffix("'/>"));
    let line = words.map(|word| if word == "-object" { "-object ".into() } else { format!("{word}\n") });
    assert_eq!(advice(&world, &line.collect::<String>()), Vec::<String>::new(), "{domain}");
    let mut running = Domain::start(&world, &domain);
    let expected = [("img".to_owned(), "r--s".to_owned(), 6), ("memory".to_owned(), "rw-p".to_owned(), 64)];
    let pid = running.qemu;
    assert_eq!(mappings_of(&world, &mut running.libvirt, pid), expected);
    let words = fs::read_to_string(format!("/proc/{}/cmdline", running.qemu)).unwrap();
    assert!(words.contains("memory-backend=pc.ram") && !words.contains("balloon"), "{words:?}");
    drop(running);

    import(&world, "nodes", &[("memory", 64, "ram"), ("memory-n1", 32, "ram")]);
    world
        .stencil(&["args", "nodes", "--vmm", "libvirt"])
        .exits(2)
        .says("has 2 RAM files: libvirt creates the memory of NUMA nodes itself");
}

/// `SnapshotLoadParams` and `MemoryBackend` in Firecracker's API description: name, type, required.
const LOAD: [(&str, &str, bool); 9] = [
    ("snapshot_path", "string", true),
    ("mem_backend", "MemoryBackend", false),
    ("mem_file_path", "string", false),
    ("enable_diff_snapshots", "boolean", false),
    ("track_dirty_pages", "boolean", false),
    ("resume_vm", "boolean", false),
    ("network_overrides", "array", false),
    ("vsock_override", "object", false),
    ("clock_realtime", "boolean", false),
];
const BACKEND: [(&str, &str, bool); 2] = [("backend_type", "string", true), ("backend_path", "string", true)];

fn fits(value: &Value, fields: &[(&str, &str, bool)]) {
    let object = value.as_object().unwrap();
    for (key, value) in object {
        let (_, kind, _) =
            fields.iter().find(|f| f.0 == key).unwrap_or_else(|| panic!("unknown property {key}"));
        match *kind {
            "string" => assert!(value.is_string(), "{key}"),
            "boolean" => assert!(value.is_boolean(), "{key}"),
            "MemoryBackend" => fits(value, &BACKEND),
            kind => panic!("{key} has unexpected type {kind}"),
        }
    }
    assert!(fields.iter().all(|(name, _, required)| !required || object.contains_key(*name)), "{value}");
}

#[test]
fn the_body_for_firecracker_matches_its_api() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let memory = guest_like(3, 4 * MIB);
    let paths = ["fc.memory", "fc.state"].map(|name| world.dir().join(name));
    fs::write(&paths[0], &memory).unwrap();
    fs::write(&paths[1], state(0x8664, "10.0.0", 9)).unwrap();
    let [memory_path, state_path] = paths.each_ref().map(|p| p.to_str().unwrap());
    world.stencil(&["import", memory_path, "fc", "--state", state_path, "--format", "firecracker"]).ok();

    let body: Value = serde_json::from_str(&text(&world, "fc", "firecracker")).unwrap();
    fits(&body, &LOAD);
    assert_eq!(body["mem_backend"]["backend_type"], "File");
    assert_eq!(body["resume_vm"], json!(true));
    assert_eq!(world.json(&["args", "fc", "--vmm", "firecracker"])["body"], body);
    let served = fs::read(body["mem_backend"]["backend_path"].as_str().unwrap()).unwrap();
    assert!(served == memory);
    assert_eq!(fs::read(body["snapshot_path"].as_str().unwrap()).unwrap(), fs::read(&paths[1]).unwrap());

    import(&world, "plain", &[("memory", 4, "ram")]);
    world
        .stencil(&["args", "plain", "--vmm", "firecracker"])
        .exits(2)
        .says("neither a file 'state' nor a blob");
    world.stencil(&["import", memory_path, "other", "--state", memory_path]).ok();
    world.stencil(&["args", "other", "--vmm", "firecracker"]).exits(2).says("was not written by Firecracker");
    world.stencil(&["args", "none", "--vmm", "firecracker"]).exits(4);
    world.stencil(&["args", "plain", "--vmm", "xen"]).exits(2);
}

/// Writes Kata's script for this template, and creates the directory that stands for Kata's own template.
fn kata(world: &TestMount, template: &str) -> (PathBuf, PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let script = world.dir().join("qemu-stencil");
    fs::write(&script, text(world, template, "kata")).unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let folder = world.dir().join("template");
    fs::create_dir_all(&folder).unwrap();
    (script, folder)
}

#[test]
fn the_script_for_kata_resumes_a_real_guest() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    // The RAM object has the name that Kata uses.
    let [kernel, initramfs, append] = linux();
    let theirs = |word: String| word.replace(",memory-backend=ram0", "").replace("id=ram0", "id=dimm1");
    let mut words: Vec<String> = qemu_words(world.dir(), "256M").into_iter().map(theirs).collect();
    let more = ["-numa", "node,memdev=dimm1", "-kernel", &kernel, "-initrd", &initramfs, "-append"];
    words.extend(more.map(str::to_owned));
    words.push(append);
    let vm = Qemu::start(world.dir(), &words);
    vm.wait_heartbeats(3);
    world.stencil(&["capture", vm.socket().to_str().unwrap(), "guest:v1"]).ok();
    drop(vm);
    world.mount(&[]).ok();
    let (script, _) = kata(&world, "guest:v1");
    let recipe = world.json(&["inspect", "guest:v1"])["recipe"].clone();
    let by_id = world.json(&["path", "guest:v1"])["path"].as_str().unwrap().to_owned();

    // The VM as the Go runtime of Kata 4.1 resumes it (`setupTemplate` and `bootFromTemplate` in
    // virtcontainers/qemu.go, `appendMemoryKnobs` in pkg/govmm/qemu/qemu.go), with the mount in the place of its
    // template directory: a RAM file that QEMU would open read-write, device state by `exec:cat`.
    let theirs = format!("memory-backend-file,id=dimm1,size=256M,mem-path={by_id}/memory,prealloc=on");
    let words: Vec<String> = recipe["argv"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| {
            let word = word.as_str().unwrap();
            if word.starts_with("memory-backend-file,") {
                return theirs.clone();
            }
            let word = word.replace("{dir}", world.dir().to_str().unwrap()).replace("{id}", "kata");
            let word = word.replace("{uuid}", "7d4a2c1e-0000-4000-8000-000000000001");
            word.replace("{file:", &format!("{by_id}/")).replace('}', "")
        })
        .collect();
    assert!(words.contains(&"-incoming".to_owned()) && words.contains(&theirs), "{words:?}");
    let alone = Command::new("timeout").args(["30", "qemu-system-x86_64"]).args(&words).output().unwrap();
    let err = String::from_utf8_lossy(&alone.stderr);
    assert!(
        alone.status.code() == Some(1) && err.contains("can't open backing store"),
        "without the script: {err}"
    );
    let mut command = Command::new(&script);
    let mut qemu = Running::start(command.args(&words), &world.dir().join("qemu.log"));
    let mut qmp = patiently("QMP", Duration::from_secs(30), || {
        let log = fs::read_to_string(world.dir().join("qemu.log")).unwrap();
        assert!(qemu.0.try_wait().unwrap().is_none(), "{log}");
        Qmp::connect(&world.dir().join("qmp.sock")).ok()
    });
    Settings::of(&mut qmp).unwrap().for_device_state().apply(&mut qmp).unwrap();
    qmp.run("migrate-incoming", json!({"uri": format!("exec:cat {by_id}/state")})).unwrap();
    wait_end(&mut qmp, Instant::now() + Duration::from_secs(60)).unwrap();
    qmp.run("cont", json!({})).unwrap();
    let serial = world.dir().join("serial.log");
    patiently("heartbeats", Duration::from_secs(60), || (heartbeats(&serial).len() >= 3).then_some(()));
    assert!(heartbeats(&serial)[0].count >= 4, "the guest has booted instead of resuming");
    assert_eq!(mappings(&world, &mut qemu), [("memory".to_owned(), "rw-p".to_owned(), 256)]);
    let density = world.json(&["density"]);
    let private = density["clones"][0]["private_bytes"].as_u64().unwrap();
    assert!(private < 64 << 20, "prealloc was not removed: {private} private bytes");
    let words = fs::read_to_string(format!("/proc/{}/cmdline", qemu.0.id())).unwrap().replace('\0', "\n");
    let line = words.replace("-object\n", "-object ");
    assert_eq!(advice(&world, &line), Vec::<String>::new(), "{line}");
}

#[test]
fn the_script_for_kata_accepts_its_forms_and_refuses_others() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let paths = ["memory", "state"].map(|name| world.dir().join(name));
    fs::write(&paths[0], guest_like(3, 64 * MIB)).unwrap();
    fs::write(&paths[1], b"this state is never loaded here").unwrap();
    let [memory, state] = paths.each_ref().map(|p| p.to_str().unwrap());
    world.stencil(&["import", memory, "kata", "--state", state]).ok();
    let (script, folder) = kata(&world, "kata");
    let folder = folder.display();
    fs::copy(&paths[1], format!("{folder}/state")).unwrap();
    fs::copy(&paths[0], format!("{folder}/memory")).unwrap();

    let call = |words: &str| {
        let mut command = Command::new(&script);
        command.args(words.split_ascii_whitespace()).current_dir(world.dir());
        command
    };
    // A QEMU that is started by mistake would never exit.
    let refused = |words: &str| {
        let mut command = Command::new("timeout");
        command.arg("30").arg(&script).args(words.split_ascii_whitespace());
        command.current_dir(world.dir()).output().unwrap()
    };
    let common = "-machine q35,accel=tcg -nodefaults -display none";
    let numa = "-numa node,memdev=dimm1";
    let memory_of = |words: &str| {
        let mut qemu = Running::start(&mut call(words), &world.dir().join("qemu.log"));
        let pid = qemu.0.id();
        // Until the shell has executed QEMU there is no mapping.
        patiently("the mapping of the memory", Duration::from_secs(30), || {
            let log = fs::read_to_string(world.dir().join("qemu.log")).unwrap();
            assert!(qemu.0.try_wait().unwrap().is_none(), "{words}: {log}");
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
            let line = maps.lines().find(|l| l.ends_with("/memory"))?;
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            Some((words[1].to_owned(), words[5].to_owned()))
        })
    };
    let template = world.json(&["path", "kata/memory"])["path"].as_str().unwrap().to_owned();
    for object in [
        format!("memory-backend-file,id=dimm1,size=64M,mem-path={folder}/memory"),
        format!("memory-backend-file,size=67108864,mem-path={folder}/memory,id=dimm1,share=off,prealloc=on"),
        "memory-backend-ram,id=dimm1,size=65536k".to_owned(),
    ] {
        let words = format!("{common} -m 64M,slots=10,maxmem=2G -object {object} {numa} -incoming defer");
        assert_eq!(memory_of(&words), ("rw-p".to_owned(), template.clone()), "{object}");
    }
    let machine = "-machine q35,accel=tcg,memory-backend=dimm1 -nodefaults -display none -m 64M";
    let words = format!("{machine} -object memory-backend-ram,id=dimm1,size=64M -incoming defer");
    assert_eq!(memory_of(&words), ("rw-p".to_owned(), template.clone()));
    // The VM with which Kata creates its own template writes to its own file.
    let own = format!("memory-backend-file,id=dimm1,size=64M,mem-path={folder}/memory,share=on");
    let words = format!("{common} -m 64M -object {own} {numa} -S");
    assert_eq!(memory_of(&words), ("rw-s".to_owned(), format!("{folder}/memory")));
    let version = call("-version").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("QEMU emulator version"));

    let ram =
        |options: &str| format!("-object memory-backend-file,id=dimm1,mem-path={folder}/memory,{options}");
    let fine = ram("size=64M");
    for (words, why) in [
        (format!("{} {numa}", ram("size=64M,share=on")), "is shared (share=on)"),
        (format!("{} {numa}", ram("size=128M")), "expected 67108864 bytes of RAM, found 134217728"),
        (format!("{} {numa}", ram("size=lots")), "cannot read the size"),
        (format!("{fine} {numa} -numa node,memdev=dimm2"), "expected 1 RAM object, found 2"),
        (fine.clone(), "found no RAM object"),
        ("-machine memory-backend=entire-guest-memory".to_owned(), "runtime-rs keeps the RAM"),
        ("-numa node,memdev=dimm1".to_owned(), "missing -object with id dimm1"),
        (
            format!("-object memory-backend-epc,id=dimm1,size=64M {numa}"),
            "cannot replace object memory-backend-epc",
        ),
        (
            format!("{fine} {numa} -device vhost-user-fs-pci,chardev=c,tag=k"),
            "device vhost-user-fs-pci; set shared_fs",
        ),
    ] {
        let run = refused(&format!("{common} -m 64M {words} -incoming defer"));
        let err = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{words}: {err}");
        assert!(err.starts_with("error: ") && err.contains(why), "{words}: {err}");
    }
    fs::write(format!("{folder}/state"), b"this state is another template's").unwrap();
    let run = refused(&format!("{common} -m 64M {fine} {numa} -incoming defer"));
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.code() == Some(1) && err.contains("differs from the device state of the template"),
        "{err}"
    );
}

#[test]
fn the_commands_for_kata_put_the_mount_into_the_place_of_its_directory() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let json = world.dir().join("json");
    fs::write(&json, "{}").unwrap();
    let memory = guest_like(3, MIB);
    let file = |name: &str| format!("{name}={},kind=blob", json.display());
    fs::write(world.dir().join("source"), &memory).unwrap();
    let source = world.dir().join("source").display().to_string();
    world
        .stencil(&["import", &source, "clh", "--file", &file("config.json"), "--file", &file("state.json")])
        .ok();
    // Kata's directory is a tmpfs. Cloud Hypervisor and Dragonball open the memory read-only.
    let script = format!(
        "set -e; mount -t tmpfs none /run; mkdir -p /run/vc/vm/template; mount -t tmpfs none /run/vc/vm/template; \
         cd /run/vc/vm; echo old >template/memory; {}; cmp template/memory {source}; ls template; \
         grep -c /run/vc/vm/template /proc/self/mounts; ! echo >>template/memory",
        text(&world, "clh", "kata").trim_end().replace('\n', "; ")
    );
    let run = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{err}");
    assert_eq!(
        String::from_utf8_lossy(&run.stdout),
        "config.json\nmanifest.json\nmemory\nstate.json\n1\n",
        "{err}"
    );
}
