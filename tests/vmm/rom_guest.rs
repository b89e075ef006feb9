//! Linux guests with a read-only NVDIMM on a template, and with one RAM file per NUMA node.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::actor::compile;
use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::word_sum;
use crate::support::vm::guest::{Qemu, linux, patiently};

const MIB: u64 = 1 << 20;

/// The checksum that the guest computes: FNV-1a over 64-bit words.
fn digest(bytes: &[u8]) -> String {
    format!("{:#x}", word_sum(bytes))
}

/// Writes a ROM of `mib` MiB in which no two pages are equal, and returns its checksum.
fn write_rom(path: &Path, mib: u64) -> String {
    let words = (0..mib * MIB / 8).map(|i| (i / 64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(path, &bytes).unwrap();
    digest(&bytes)
}

/// Returns a kernel, an initramfs that prints the NUMA nodes and then runs `rom.c`, and a kernel command line that
/// allows writes to all physical memory through /dev/mem (`iomem=relaxed`).
fn guest(dir: &Path) -> (String, PathBuf, String) {
    let [kernel, initramfs, append] = linux();
    let root = dir.join("root");
    fs::create_dir_all(&root).unwrap();
    fs::copy(compile("rom"), root.join("rom")).unwrap();
    let init = "#!/bin/busybox sh\n\
        /bin/busybox mount -t devtmpfs dev /dev\n\
        /bin/busybox mount -t proc proc /proc\n\
        /bin/busybox mount -t sysfs sys /sys\n\
        exec </dev/ttyS0 >/dev/ttyS0 2>&1\n\
        echo nodes /sys/devices/system/node/node*\n\
        exec /rom\n";
    fs::write(root.join("init"), init).unwrap();
    // The kernel unpacks concatenated cpio archives in order: files of the second replace those of the first.
    let pack = format!(
        "cd {} && chmod 755 init && printf 'init\\nrom\\n' | cpio --quiet -o -H newc",
        root.display()
    );
    let more = Command::new("sh").args(["-c", &pack]).output().unwrap();
    assert!(more.status.success(), "{}", String::from_utf8_lossy(&more.stderr));
    let both = dir.join("initramfs");
    let mut file = File::create(&both).unwrap();
    let first = fs::read(initramfs).unwrap();
    file.write_all(&first).unwrap();
    file.write_all(&vec![0; first.len().next_multiple_of(4) - first.len()]).unwrap();
    file.write_all(&more.stdout).unwrap();
    (kernel, both, format!("{append} iomem=relaxed"))
}

/// Waits for the first complete line of the serial log that starts with `start`.
fn line(serial: &Path, start: &str) -> String {
    patiently(&format!("line '{start}'"), Duration::from_secs(180), || {
        let text = String::from_utf8_lossy(&fs::read(serial).unwrap_or_default()).into_owned();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]).to_owned();
        complete.lines().find(|l| l.starts_with(start)).map(|l| l.trim_end().to_owned())
    })
}

/// Dirty pages of the ROM and of the other files, from `stencil dirty`; and Private_Dirty of the ROM in KiB, from
/// smaps.
fn copied(world: &TestMount, pid: u32, rom: &str) -> (u64, u64, u64) {
    let dirty = world.json(&["dirty", &pid.to_string(), "--ranges"]);
    let pages = |of_rom: bool| -> u64 {
        let ranges = dirty["ranges"].as_array().unwrap().iter().filter(|r| (r["file"] == rom) == of_rom);
        ranges.map(|r| r["pages"].as_u64().unwrap()).sum()
    };
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let part = smaps.split(&format!("/{rom}\n")).nth(1).expect("the ROM must be mapped");
    let private = part.lines().find_map(|l| l.strip_prefix("Private_Dirty:")).unwrap();
    let private = private.trim().trim_end_matches(" kB").parse().unwrap();
    (pages(true), pages(false), private)
}

#[test]
fn guest_stores_to_a_rom_copy_no_pages_on_passthrough() {
    assert_stores_copy_nothing("passthrough");
}

#[test]
fn soak_guest_stores_to_a_rom_copy_no_pages_on_decode() {
    if !host::soaking() {
        return println!("skipped: stores to a ROM on decode need `make soak`");
    }
    assert_stores_copy_nothing("decode");
}

fn assert_stores_copy_nothing(serve: &str) {
    let _host = host::shared();
    let world = TestMount::new(serve);
    let rom = world.dir().join("rom.source");
    let sum = write_rom(&rom, 200);
    let ram = world.dir().join("ram.source");
    File::create(&ram).unwrap().set_len(192 * MIB).unwrap();
    let file = format!("rom={},kind=rom", rom.display());
    world.stencil(&["import", ram.to_str().unwrap(), "guest", "--file", &file]).ok();
    let (kernel, initramfs, append) = guest(world.dir());
    let serial = world.dir().join("serial");
    let qemu_line = world.stencil(&["args", "guest", "--vmm", "qemu"]).ok().out;
    let rest = format!(
        "-accel tcg -cpu max -nodefaults -display none -serial file:{} -kernel {kernel} -initrd {} -append '{}'",
        serial.display(),
        initramfs.display(),
        append
    );
    let script = format!("exec {} {rest}", qemu_line.trim_end());
    let qemu = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap();
    let qemu = Running(qemu);
    let read = line(&serial, "rom ");
    let fields: Vec<&str> = read.split(' ').collect();
    assert_eq!(
        (fields[2], fields[3]),
        ((200 * MIB).to_string().as_str(), sum.as_str()),
        "the guest must read the bytes of the template"
    );
    let stores = line(&serial, "stores ");
    assert_eq!(stores, format!("stores {} {sum}", 200 * MIB / 8), "stores of the guest must have no effect");
    let (of_rom, of_ram, rom_kib) = copied(&world, qemu.0.id(), "rom");
    println!("{serve}: private pages after 200 MiB of stores: {of_rom} of the ROM, {of_ram} of RAM");
    assert_eq!((of_rom, rom_kib), (0, 0));
    assert!(of_ram > 1000, "writes to RAM must be counted: {of_ram}");

    // `density` reports the same: all private bytes are RAM.
    let density = world.json(&["density"]);
    let clone = &density["clones"][0];
    let maps = clone["maps"].as_array().unwrap();
    assert!(maps.iter().any(|m| m["file"] == "rom" && m["length"] == 200 * MIB), "{maps:?}");
    let again = copied(&world, qemu.0.id(), "rom");
    let private = clone["private_bytes"].as_u64().unwrap() / 4096;
    assert!((of_ram..=again.1).contains(&private), "{of_ram} <= {private} <= {}", again.1);
    assert!(line(&serial, "beat 3 ").ends_with("ok"));
    drop(qemu);
    let digest = world.json(&["inspect", "guest"])["digest"].as_str().unwrap().to_owned();
    assert!(
        fs::read(world.file(&digest, "rom")).unwrap() == fs::read(&rom).unwrap(),
        "{serve}: the ROM must not change"
    );
}

#[test]
fn captures_and_clones_a_guest_with_numa_nodes_and_an_nvdimm() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let dir = world.dir();
    let rom = dir.join("rom.source");
    let sum = write_rom(&rom, 16);
    let (kernel, initramfs, append) = guest(dir);
    let text = format!(
        "-M q35,nvdimm=on -accel tcg -cpu max -m 256M,slots=2,maxmem=4G -smp 2 -nodefaults -no-user-config -display none \
         -object memory-backend-file,id=ram0,size=128M,mem-path={d}/ram0,share=on \
         -object memory-backend-file,id=ram1,size=128M,mem-path={d}/ram1,share=on \
         -numa node,nodeid=0,cpus=0,memdev=ram0 -numa node,nodeid=1,cpus=1,memdev=ram1 \
         -object memory-backend-file,id=nv,size=16M,mem-path={d}/rom.source,share=on,readonly=on \
         -device nvdimm,id=nvdimm0,memdev=nv,unarmed=on -device vmgenid,guid=auto \
         -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
         -serial file:{d}/serial -qmp unix:{d}/qmp,server=on,wait=off -kernel {kernel} -initrd {i}",
        d = dir.display(),
        i = initramfs.display()
    );
    let mut args: Vec<String> = text.split_ascii_whitespace().map(str::to_owned).collect();
    args.extend(["-append".to_owned(), append]);
    let vm = Qemu::start(dir, &args);
    let serial = dir.join("serial");
    let nodes = line(&serial, "nodes ");
    assert!(nodes.contains("node0") && nodes.contains("node1"), "{nodes}");
    line(&serial, "beat 3 ");

    let captured = world.json(&["capture", vm.socket().to_str().unwrap(), "numa:v1"]);
    let files = captured["files"].as_array().unwrap();
    let files: Vec<_> =
        files.iter().map(|f| (f["name"].as_str().unwrap(), f["kind"].as_str().unwrap())).collect();
    let expected = [
        ("initrd", "blob"),
        ("kernel", "blob"),
        ("memory", "ram"),
        ("memory-ram1", "ram"),
        ("rom-nv", "rom"),
        ("state", "blob"),
    ];
    assert_eq!(files, expected);
    let state = captured["state_bytes"].as_u64().unwrap();
    assert!(state < 8 * MIB, "the device state must contain neither RAM nor ROM: {state} bytes");

    let launched = world.json(&["clone", "numa:v1", "-n", "2"]);
    for clone in launched["clones"].as_array().unwrap() {
        let serial = Path::new(clone["dir"].as_str().unwrap()).join("serial.log");
        let beats = patiently("beats of a clone", Duration::from_secs(60), || {
            let text = fs::read_to_string(&serial).unwrap_or_default();
            let beats: Vec<String> =
                text.lines().filter(|l| l.starts_with("beat ")).map(str::to_owned).collect();
            (beats.len() >= 4).then_some(beats)
        });
        assert!(beats[1..3].iter().all(|beat| beat.trim_end().ends_with("ok")), "{beats:?}");
        let pid = clone["pid"].as_u64().unwrap() as u32;
        assert_eq!(copied(&world, pid, "rom-nv").0, 0);
        let dirty = world.json(&["dirty", &pid.to_string(), "--ranges"]);
        for node in ["memory", "memory-ram1"] {
            let ranges = dirty["ranges"].as_array().unwrap();
            assert!(
                ranges.iter().any(|r| r["file"] == node),
                "{node}: the clone must have copied pages of both nodes"
            );
        }
    }
    let density = world.json(&["density"]);
    for clone in density["clones"].as_array().unwrap() {
        let maps = clone["maps"].as_array().unwrap().iter();
        let length_of = |file: &str| {
            maps.clone().filter(|m| m["file"] == file).map(|m| m["length"].as_u64().unwrap()).sum()
        };
        let lengths: [u64; 3] = ["memory", "memory-ram1", "rom-nv"].map(length_of);
        assert_eq!(lengths, [128 * MIB, 128 * MIB, 16 * MIB]);
    }
    world.stencil(&["stop", "--all"]).ok();

    // The output of `args` has both nodes and the NVDIMM; the exported ROM equals the captured file.
    let line = world.stencil(&["args", "numa:v1", "--vmm", "qemu"]).ok().out;
    assert!(line.contains("nodeid=1,cpus=1,memdev=ram1") && line.contains("nvdimm,id=nvdimm0"), "{line}");
    let qemu = Command::new("sh").args(["-c", &format!("exec {line}")]).stdin(Stdio::null()).spawn().unwrap();
    let mut qemu = Running(qemu);
    patiently("the mappings of the QEMU that was started as printed", Duration::from_secs(60), || {
        assert!(qemu.0.try_wait().unwrap().is_none(), "QEMU exited: {line}");
        let maps = fs::read_to_string(format!("/proc/{}/maps", qemu.0.id())).unwrap();
        let mapped = |file: &str, how: &str| {
            maps.lines().any(|l| l.ends_with(&format!("/{file}")) && l.contains(&format!(" {how} ")))
        };
        (mapped("memory", "rw-p") && mapped("memory-ram1", "rw-p") && mapped("rom-nv", "r--s")).then_some(())
    });
    drop(qemu);
    let copy = dir.join("copy");
    world.stencil(&["export", "numa:v1/rom-nv", copy.to_str().unwrap()]).ok();
    assert_eq!(digest(&fs::read(copy).unwrap()), sum);
}
