//! Files in other formats than raw RAM, written by the usual programs: `import` names the format, for files and for
//! pipes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::mount::{Run, TestMount, run};
use crate::support::store::random;

fn shell(dir: &Path, script: &str) {
    let output = Command::new("bash").args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Dumps and a migration stream that QEMU writes of a guest that has not started.
fn qemu_files(dir: &Path) -> Vec<(PathBuf, &'static str)> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "pc,accel=tcg",
            "-m",
            "16",
            "-display",
            "none",
            "-nodefaults",
            "-S",
            "-monitor",
            "stdio",
        ])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let commands = "dump-guest-memory core\ndump-guest-memory -z flat\nmigrate file:stream\nquit\n";
    qemu.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    assert!(qemu.wait().unwrap().success());
    [("core", "an ELF file"), ("flat", "kdump file"), ("stream", "a QEMU migration stream")]
        .map(|(name, what)| (dir.join(name), what))
        .to_vec()
}

#[test]
fn import_names_formats_other_than_raw_memory() {
    let world = TestMount::unmounted();
    let dir = world.dir().join("made");
    fs::create_dir(&dir).unwrap();
    let mut all = qemu_files(&dir);
    for (format, what) in [
        ("qcow2", "a qcow2 image"),
        ("vmdk", "a VMDK image"),
        ("vdi", "a VDI image"),
        ("vhdx", "a VHDX image"),
        ("vpc", "a VHD image"),
        ("qed", "a QED image"),
        ("parallels", "a Parallels disk image"),
    ] {
        let path = dir.join(format);
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]);
        all.push((path, what));
    }
    fs::write(dir.join("ram"), random(8, 64 << 10)).unwrap();
    for (script, what) in [
        ("qemu-img create -q -f vpc -o subformat=fixed fixed.vhd 1M; echo fixed.vhd", "a VHD image"),
        ("gzip -k ram; echo ram.gz", "a gzip file"),
        ("zstd -q ram; echo ram.zst", "a zstd file"),
        ("xz -k ram; echo ram.xz", "an xz file"),
        ("lz4 -q ram ram.lz4; echo ram.lz4", "an lz4 file"),
        ("bzip2 -k ram; echo ram.bz2", "a bzip2 file"),
        ("zip -q ram.zip ram; echo ram.zip", "a zip archive"),
        ("tar -cf ram.tar ram; echo ram.tar", "a tar archive"),
        ("truncate -s 1M swap && /sbin/mkswap -q swap; echo swap", "a swap area"),
    ] {
        shell(&dir, script);
        all.push((dir.join(script.rsplit(' ').next().unwrap()), what));
    }
    world.import_bytes(&random(9, 8192), "web:1");
    let saved = dir.join("saved");
    world.stencil(&["save", "web:1", "-o", saved.to_str().unwrap()]).ok();
    all.push((saved, "a stream from 'stencil save'"));
    for (path, what) in &all {
        let args = ["import", path.to_str().unwrap(), "odd:1"];
        world.stencil(&args).exits(2).says(what).says("--format raw");
        if path.ends_with("fixed.vhd") {
            // The magic number of a fixed VHD is at its end: `import` sees it in a pipe only after all other bytes.
            continue;
        }
        let mut command = world.command();
        let piped = command.args(["import", "-", "odd:1"]).stdin(File::open(path).unwrap());
        Run::of(format!("{what} from a pipe"), &piped.output().unwrap()).exits(2).says(what);
    }
    assert_eq!(world.stencil(&["ls"]).ok().out.lines().count(), 2, "the heading and web:1 only");
    assert_eq!(fs::read_dir(world.store_dir().join("tmp")).unwrap().count(), 0);
    // With --format raw the file is imported, and the format of blobs is not checked.
    let odd = dir.join("qcow2");
    run("truncate", &["-s", "%4096", odd.to_str().unwrap()]);
    let odd = odd.to_str().unwrap();
    world.stencil(&["import", odd, "odd:1", "--format", "raw"]).ok();
    let ram = dir.join("ram");
    let blob = format!("disk={odd},kind=blob");
    world.stencil(&["import", ram.to_str().unwrap(), "ram:1", "--state", odd, "--file", &blob]).ok();
}
