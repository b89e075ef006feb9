//! Files that QEMU has open and whose paths were replaced: no template combines the memory of one guest with the disk
//! of another, and writes of the guest go to no other file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::capture::failures::{DiskOption, Vm};
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::store::random;
use crate::support::vm::guest::{Qemu, media, overlays, patiently, qemu_words};

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// A path that leads to another file until drop. The original file is renamed meanwhile.
struct Replaced {
    path: PathBuf,
    original: PathBuf,
}

impl Replaced {
    fn by(path: &Path, bytes: &[u8]) -> Replaced {
        let original = path.with_extension("original");
        fs::rename(path, &original).unwrap();
        fs::write(path, bytes).unwrap();
        Replaced { path: path.to_owned(), original }
    }

    fn by_copy(path: &Path) -> Replaced {
        Replaced::by(path, &fs::read(path).unwrap())
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        fs::rename(&self.original, &self.path).unwrap();
    }
}

#[test]
fn capture_refuses_a_vm_whose_files_were_replaced() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let dir = world.dir();
    let file = |name: &str, seed: u64, bytes: usize| {
        let path = dir.join(name);
        fs::write(&path, random(seed, bytes)).unwrap();
        path
    };
    let (base, raw, twin, cd) =
        (file("base", 1, 1 << 20), file("raw", 2, 1 << 20), file("twin", 3, 1 << 20), file("cd", 4, 1 << 20));
    // The same length as `raw`, with other parts allocated.
    fs::OpenOptions::new().write(true).open(&twin).unwrap().set_len(1 << 16).unwrap();
    fs::OpenOptions::new().write(true).open(&twin).unwrap().set_len(1 << 20).unwrap();
    let (top, rom, flash) = (dir.join("top.qcow2"), file("rom", 5, 4 << 20), dir.join("flash"));
    fs::copy("/usr/share/seabios/bios-256k.bin", &flash).unwrap();
    let words =
        ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), top.to_str().unwrap()];
    run("qemu-img", &words);
    let extra = format!(
        "-machine q35,nvdimm=on,memory-backend=ram0 -m 64M,slots=1,maxmem=1G -drive if=none,id=top,format=qcow2,file={} -device virtio-blk-pci,drive=top \
         -drive if=none,id=raw,format=raw,file={} -device virtio-blk-pci,drive=raw \
         -blockdev driver=file,node-name=f,filename={} -blockdev driver=raw,node-name=twin,file=f -device virtio-blk-pci,drive=twin \
         -drive if=none,id=cd,media=cdrom,format=raw,file={} -device ide-cd,drive=cd \
         -drive if=pflash,format=raw,readonly=on,file={} \
         -object memory-backend-file,id=rom0,size=4M,mem-path={},share=on,readonly=on -device nvdimm,memdev=rom0,unarmed=on",
        top.display(),
        raw.display(),
        twin.display(),
        cd.display(),
        flash.display(),
        rom.display(),
    );
    let mut words = qemu_words(dir, "64M");
    words.extend(extra.split_ascii_whitespace().map(str::to_owned));
    let qemu = Qemu::start(dir, &words);
    let socket = qemu.socket();
    let socket = socket.to_str().unwrap();

    for path in [&top, &base, &raw, &twin, &cd, &flash, &rom, &dir.join("ram")] {
        let original = inode(path);
        let replaced = Replaced::by_copy(path);
        for extra in [&[][..], &["--pause"]] {
            let run = world.stencil(&[&["capture", socket, "vm:x"], extra].concat()).exits(2);
            assert!(run.err.contains(path.to_str().unwrap()), "{}", run.err);
            if path != &rom && !path.ends_with("ram") {
                let both = [original, inode(path)].map(|ino| format!("inode {ino} of device"));
                assert!(both.iter().all(|inode| run.err.contains(inode)), "{}", run.err);
            }
            assert!(run.err.lines().count() >= 2, "no hint: {}", run.err);
            assert_eq!(qemu.status(), "running");
        }
        drop(replaced);
    }
    // The paths of two files that QEMU has open are exchanged.
    let third = dir.join("third");
    let exchange = || {
        fs::rename(&raw, &third).unwrap();
        fs::rename(&twin, &raw).unwrap();
        fs::rename(&third, &twin).unwrap();
    };
    exchange();
    world.stencil(&["capture", socket, "vm:x"]).exits(2).says("were exchanged");
    exchange();
    world.stencil(&["inspect", "vm:x"]).exits(4);
    assert_eq!(qemu.status(), "running");

    // Every path leads to the original file again.
    let captured = world.json(&["capture", socket, "vm:x", "--pause"]);
    assert_eq!(captured["warnings"], json!([]), "{captured}");
    for (name, path) in [("disk-raw", &raw), ("disk-twin", &twin), ("disk-cd", &cd), ("rom-rom0", &rom)] {
        let copy = dir.join("copy");
        world.stencil(&["export", &format!("vm:x/{name}"), copy.to_str().unwrap()]).ok();
        assert!(fs::read(&copy).unwrap() == fs::read(path).unwrap(), "{name}");
        fs::remove_file(copy).unwrap();
    }
}

#[test]
fn capture_refuses_exchanged_memory_files_of_numa_nodes() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let (ram, other, third) = (world.dir().join("ram"), world.dir().join("ram1"), world.dir().join("third"));
    let extra = format!(
        "-m 32M -object memory-backend-file,id=ram1,size=16M,mem-path={},share=on -numa node,memdev=ram0 -numa node,memdev=ram1",
        other.display()
    );
    let words = qemu_words(world.dir(), "16M").join(" ").replace("q35,memory-backend=ram0", "q35");
    let words: Vec<String> = format!("{words} {extra}").split_ascii_whitespace().map(str::to_owned).collect();
    let qemu = Qemu::start(world.dir(), &words);
    let socket = qemu.socket();
    let exchange = || {
        fs::rename(&ram, &third).unwrap();
        fs::rename(&other, &ram).unwrap();
        fs::rename(&third, &other).unwrap();
    };
    exchange();
    world
        .stencil(&["capture", socket.to_str().unwrap(), "vm:x"])
        .exits(2)
        .says("does not map memory object 'ram0' from this file");
    exchange();
    world.json(&["capture", socket.to_str().unwrap(), "vm:x"]);
}

#[test]
fn an_image_replaced_during_its_read_receives_no_writes() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let (image, dir) = (vm.image(), vm.dir());
    // The content of the disk for the guest before its next write.
    let before = dir.join("before.raw");
    run("qemu-img", &["convert", "-U", "-O", "raw", image.to_str().unwrap(), before.to_str().unwrap()]);
    let before = fs::read(&before).unwrap();
    let capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
    vm.write();
    let replaced = Replaced::by_copy(&image);
    let replacement = fs::read(&image).unwrap();
    let run = capture.finish().exits(1);
    assert!(run.err.contains("the image of the VM was replaced: expected inode"), "{}", run.err);
    assert!(run.err.contains("created template vm:x"), "{}", run.err);
    let copy = dir.join("copy");
    vm.world.stencil(&["export", "vm:x/disk-root", copy.to_str().unwrap()]).ok();
    assert!(fs::read(&copy).unwrap() == before, "the template has another disk than QEMU");
    fs::remove_file(&copy).unwrap();
    // The guest continues on the overlay, and the replacement is not modified.
    vm.write();
    assert_eq!(vm.qmp.status().unwrap(), "running");
    assert!(media(&mut vm.qmp).to_string().contains(".stencil-"));
    assert!(fs::read(&image).unwrap() == replacement);
    drop(replaced);
    vm.wait_restored();

    // The same if QEMU exits meanwhile.
    let capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
    vm.write();
    vm.qmp.run("quit", json!({})).unwrap();
    patiently("the exit of QEMU", Duration::from_secs(10), || vm.qemu.has_ended().then_some(()));
    let replaced = Replaced::by_copy(&image);
    let replacement = fs::read(&image).unwrap();
    let run = capture.finish().exits(1);
    assert!(run.err.contains("the image of the VM was replaced: expected inode"), "{}", run.err);
    assert!(fs::read(&image).unwrap() == replacement);
    assert_eq!(overlays(&dir).len(), 1);
    drop(replaced);
    // The helper tries the commit again.
    patiently("the removal of the overlay", Duration::from_secs(30), || {
        overlays(&dir).is_empty().then_some(())
    });
    vm.assert_image_has_all_writes();
}

#[test]
fn capture_warns_of_a_kernel_file_changed_after_startup() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let [kernel, ..] = crate::support::vm::guest::linux();
    let copy = world.dir().join("vmlinuz");
    fs::copy(kernel, &copy).unwrap();
    let mut words = qemu_words(world.dir(), "64M");
    words.extend(["-kernel".to_owned(), copy.display().to_string()]);
    let qemu = Qemu::start(world.dir(), &words);
    let socket = qemu.socket();
    let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:1"]);
    assert_eq!(captured["warnings"], json!([]));
    let bytes = fs::read(&copy).unwrap();
    fs::remove_file(&copy).unwrap();
    fs::write(&copy, bytes).unwrap();
    let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:2"]);
    let warnings = captured["warnings"].to_string();
    assert!(warnings.contains("was changed after QEMU read it"), "{warnings}");
}
