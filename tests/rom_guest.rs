//! Real guests with a read-only NVDIMM on a template, and with a RAM file for each NUMA node.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::actor::compile;
use crate::support::guest::{Qemu, linux, patiently};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::passing::Running;
use crate::support::store::word_sum;

const MIB: u64 = 1 << 20;

/// The guest's own sum of a memory: FNV-1a over words.
fn digest(bytes: &[u8]) -> String {
    format!("{:#x}", word_sum(bytes))
}

/// A ROM of so many MiB in which no two pages are alike, and its sum.
fn write_rom(path: &Path, mib: u64) -> String {
    let words = (0..mib * MIB / 8).map(|i| (i / 64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(path, &bytes).unwrap();
    digest(&bytes)
}

/// Kernel, an initramfs whose only program is `rom.c`, after the number of NUMA nodes, and a command line that lets it write
/// to any memory.
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
    // A second archive behind the first one takes the place of its files.
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

/// The first line of the serial log that begins so.
fn line(serial: &Path, begin: &str) -> String {
    patiently(&format!("'{begin}'"), Duration::from_secs(180), || {
        let text = String::from_utf8_lossy(&fs::read(serial).unwrap_or_default()).into_owned();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]).to_owned();
        whole.lines().find(|l| l.starts_with(begin)).map(|l| l.trim_end().to_owned())
    })
}

/// How many pages of each file the clone has copied, by `stencil dirty`; and the kernel's own sum for its ROM.
fn copied(world: &TestMount, pid: u32, rom: &str) -> (u64, u64, u64) {
    let dirty = world.json(&["dirty", &pid.to_string(), "--ranges"]);
    let pages = |of_rom: bool| -> u64 {
        let ranges = dirty["ranges"].as_array().unwrap().iter().filter(|r| (r["file"] == rom) == of_rom);
        ranges.map(|r| r["pages"].as_u64().unwrap()).sum()
    };
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let part = smaps.split(&format!("/{rom}\n")).nth(1).expect("the ROM is mapped");
    let private = part.lines().find_map(|l| l.strip_prefix("Private_Dirty:")).unwrap();
    let private = private.trim().trim_end_matches(" kB").parse().unwrap();
    (pages(true), pages(false), private)
}

#[test]
fn two_hundred_mebibytes_of_stores_into_a_rom_copy_nothing() {
    stores_copy_nothing("passthrough");
}

#[test]
fn soak_two_hundred_mebibytes_of_stores_into_a_rom_on_decode_copy_nothing() {
    if !host::soaking() {
        return println!("a ROM on decode is written to in `make soak` only");
    }
    stores_copy_nothing("decode");
}

fn stores_copy_nothing(serve: &str) {
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
    let line_of = world.stencil(&["args", "guest", "--vmm", "qemu"]).ok().out;
    let rest = format!(
        "-accel tcg -cpu max -nodefaults -display none -serial file:{} -kernel {kernel} -initrd {} -append '{}'",
        serial.display(),
        initramfs.display(),
        append
    );
    let script = format!("exec {} {rest}", line_of.trim_end());
    let qemu = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap();
    let qemu = Running(qemu);
    let read = line(&serial, "rom ");
    let words: Vec<&str> = read.split(' ').collect();
    assert_eq!(
        (words[2], words[3]),
        ((200 * MIB).to_string().as_str(), sum.as_str()),
        "it reads the template"
    );
    let stores = line(&serial, "stores ");
    assert_eq!(stores, format!("stores {} {sum}", 200 * MIB / 8), "nothing that it wrote is there");
    let (of_rom, of_ram, kernels) = copied(&world, qemu.0.id(), "rom");
    println!("{serve}: after 200 MiB of stores {of_rom} pages of the ROM are private, of RAM {of_ram}");
    assert_eq!((of_rom, kernels), (0, 0));
    assert!(of_ram > 1000, "what it writes to RAM is seen: {of_ram}");

    // `density` says the same: all that it calls private is RAM.
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
    assert!(fs::read(world.file(&digest, "rom")).unwrap() == fs::read(&rom).unwrap(), "{serve}: unchanged");
}

#[test]
fn a_guest_with_two_nodes_and_an_nvdimm_is_captured_and_cloned() {
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
    let mut words: Vec<String> = text.split_ascii_whitespace().map(str::to_owned).collect();
    words.extend(["-append".to_owned(), append]);
    let vm = Qemu::start(dir, &words);
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
    assert!(state < 8 * MIB, "neither nodes nor ROM are in the device state: {state}");

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
            assert!(ranges.iter().any(|r| r["file"] == node), "{node}: both nodes are private RAM");
        }
    }
    let density = world.json(&["density"]);
    for clone in density["clones"].as_array().unwrap() {
        let maps = clone["maps"].as_array().unwrap().iter();
        let of = |file: &str| {
            maps.clone().filter(|m| m["file"] == file).map(|m| m["length"].as_u64().unwrap()).sum()
        };
        let lengths: [u64; 3] = ["memory", "memory-ram1", "rom-nv"].map(of);
        assert_eq!(lengths, [128 * MIB, 128 * MIB, 16 * MIB]);
    }
    world.stencil(&["stop", "--all"]).ok();

    // What `args` prints of it has the nodes and the NVDIMM; the template's ROM is the file that was there.
    let line = world.stencil(&["args", "numa:v1", "--vmm", "qemu"]).ok().out;
    assert!(line.contains("nodeid=1,cpus=1,memdev=ram1") && line.contains("nvdimm,id=nvdimm0"), "{line}");
    let qemu = Command::new("sh").args(["-c", &format!("exec {line}")]).stdin(Stdio::null()).spawn().unwrap();
    let mut qemu = Running(qemu);
    patiently("a QEMU as printed", Duration::from_secs(60), || {
        assert!(qemu.0.try_wait().unwrap().is_none(), "QEMU ended: {line}");
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
