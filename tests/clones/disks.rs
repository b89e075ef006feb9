//! Disks of clones: their directory, their share of the RAM figures, and their removal however a clone or a launcher
//! ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::clones::command::{nothing_is_left, processes_of};
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::store::random;
use crate::support::vm::guest::patiently;

/// A program that maps the template, as a VMM does.
const MAP_TEMPLATE: &str = "qemu-system-x86_64 -M none -nodefaults -display none \
                    -object memory-backend-file,id=m,size=1M,mem-path={memory},share=off,readonly=on,rom=off";

/// A tmpfs, unmounted on drop.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts a tmpfs on a directory, which is created if needed.
    pub fn on(dir: &Path) -> Tmpfs {
        fs::create_dir_all(dir).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "mode=0700", "none", dir.to_str().unwrap()]);
        Tmpfs(dir.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

/// Returns the allocated size of files as du(1) counts it, in bytes.
pub fn du(files: &[PathBuf]) -> u64 {
    let options = ["--block-size=1", "--total"].iter().map(Into::into);
    let args: Vec<PathBuf> = options.chain(files.iter().cloned()).collect();
    run("du", &args).lines().last().unwrap().split('\t').next().unwrap().parse().unwrap()
}

/// Mounts a store with a template that has a disk.
fn world() -> TestMount {
    let world = TestMount::new("auto");
    let (ram, disk) = (world.dir().join("ram"), world.dir().join("root"));
    fs::write(&ram, random(1, 1 << 20)).unwrap();
    fs::write(&disk, random(2, 8 << 20)).unwrap();
    let file = format!("disk-root={},kind=blob", disk.display());
    world.json(&["import", ram.to_str().unwrap(), "web", "--file", &file]);
    let argv = "-M q35,memory-backend=m -object memory-backend-file,id=m,mem-path={memory} -drive file={disk:root} \
                -chardev path={dir}/qmp.sock -incoming defer";
    let recipe = json!({"version": 1, "vmm": "qemu", "program": "qemu",
        "disks": [{"name": "root", "base": "disk-root", "format": "raw"}],
        "argv": argv.split_whitespace().collect::<Vec<_>>()});
    let path = world.dir().join("recipe");
    fs::write(&path, recipe.to_string()).unwrap();
    world.stencil(&["recipe", "edit", "web", "--from", path.to_str().unwrap()]).ok();
    world
}

fn overlays(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == "qcow2"));
    found.sort();
    found
}

#[test]
fn disks_are_created_in_disk_dir_and_removed_with_the_clone() {
    let _host = host::shared();
    let world = world();
    let disks = world.dir().join("disks");
    fs::create_dir(&disks).unwrap();
    let foreign_file = disks.join("stencil-c0000000-c0000000-root.qcow2");
    fs::write(&foreign_file, "another user's file").unwrap();
    let script = format!("qemu-io -f qcow2 -c 'write 0 1M' {{disk:root}} && exec {MAP_TEMPLATE}");
    let clone = ["clone", "web", "-n", "3", "--disk-dir", "disks", "--", "sh", "-c", &script];
    // Asserts that the directory has `count` disks of clones beside the foreign file; returns all paths.
    let assert_disks = |count: usize| {
        let found = overlays(&disks);
        assert_eq!(found.len(), count + 1, "{found:?}");
        assert_eq!(fs::read_to_string(&foreign_file).unwrap(), "another user's file");
        found
    };

    let launched = world.json(&clone);
    for path in assert_disks(3).iter().filter(|path| **path != foreign_file) {
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            0o600,
            "only the owner may read the disk of a guest"
        );
        assert!(du(std::slice::from_ref(path)) > 1 << 20, "{}", path.display());
        run("qemu-img", &["check", "-q", "-U", path.to_str().unwrap()]);
    }
    for clone in launched["clones"].as_array().unwrap() {
        assert_eq!(overlays(Path::new(clone["dir"].as_str().unwrap())), Vec::<PathBuf>::new());
        let id = clone["id"].as_str().unwrap();
        assert_eq!(assert_disks(3).iter().filter(|path| path.to_str().unwrap().contains(id)).count(), 1);
    }
    let first = launched["clones"][0]["id"].as_str().unwrap();
    world.stencil(&["stop", first]).ok();
    assert_disks(2);
    // The disk of a killed clone is removed by `stencil stop`, with the directory of the clone.
    let pid = launched["clones"][1]["pid"].as_i64().unwrap() as i32;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    world.stencil(&["stop", "--all"]).ok();
    assert_disks(0);
    nothing_is_left(&world);

    // A launcher is killed, alone or together with its watchdog.
    for kill_watchdog in [false, true] {
        let mut command = world.command();
        let script = "qemu-io -f qcow2 -c 'write 0 1M' {disk:root}; exec sleep 1000";
        command.args([
            "clone",
            "web",
            "-n",
            "3",
            "--disk-dir",
            "disks",
            "--ready",
            "notify",
            "--",
            "sh",
            "-c",
        ]);
        let mut launcher = command.arg(script).stderr(Stdio::null()).spawn().unwrap();
        patiently("clones with disks", Duration::from_secs(20), || {
            (processes_of(&world).iter().filter(|p| p.contains("sleep 1000")).count() >= 3).then_some(())
        });
        assert_disks(3);
        for process in processes_of(&world).iter().filter(|p| kill_watchdog && p.contains("launch-watchdog"))
        {
            let pid = process.split_once(' ').unwrap().0.parse().unwrap();
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        launcher.kill().unwrap();
        launcher.wait().unwrap();
        if kill_watchdog {
            assert_disks(3);
            assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
        }
        patiently("the removal of the disks", Duration::from_secs(20), || {
            (overlays(&disks).len() == 1).then_some(())
        });
        patiently("the end of the launch", Duration::from_secs(20), || {
            (fs::read_dir(world.runtime_dir().join("launches")).unwrap().next().is_none()).then_some(())
        });
        assert_disks(0);
        nothing_is_left(&world);
    }

    let mut invalid_dir = clone;
    invalid_dir[5] = "nowhere";
    world.stencil(&invalid_dir).exits(4);
    invalid_dir[5] = "ram";
    world.stencil(&invalid_dir).exits(2);
    nothing_is_left(&world);
}

#[test]
fn density_counts_disks_on_tmpfs() {
    let _host = host::shared();
    let world = world();
    let _tmpfs = Tmpfs::on(&world.dir().join("memory"));
    fs::create_dir(world.dir().join("disks")).unwrap();
    let write = "qemu-io -f qcow2 -c 'write 0 3M' {disk:root}";
    let same_process = format!("{write} && exec {MAP_TEMPLATE}");
    // The process that maps the template is a child of the process in the record.
    let child_process =
        format!("{write} && {{ {MAP_TEMPLATE} & sleep 1; echo 1 >/proc/self/fd/$STENCIL_NOTIFY; wait; }}");
    for (disk_dir, ready, script, in_ram) in [
        ("memory", "mapped", &same_process, true),
        ("memory", "notify", &child_process, true),
        ("disks", "mapped", &same_process, false),
    ] {
        world
            .stencil(&[
                "clone",
                "web",
                "-n",
                "2",
                "--disk-dir",
                disk_dir,
                "--ready",
                ready,
                "--",
                "sh",
                "-c",
                script,
            ])
            .ok();
        let density = world.json(&["density"]);
        let disk_bytes = |value: &Value| value["disk_bytes"].as_u64().unwrap();
        let files = overlays(&world.dir().join(disk_dir));
        assert_eq!(files.len(), 2);
        let expected = if in_ram { du(&files) } else { 0 };
        assert!(expected == 0 || expected > 6 << 20, "{expected}");
        assert_eq!(disk_bytes(&density["totals"]), expected, "{density:#}");
        let clones = density["clones"].as_array().unwrap();
        let each: Vec<u64> = clones.iter().map(disk_bytes).collect();
        assert_eq!((each.len(), each.iter().sum::<u64>()), (2, expected), "{density:#}");
        assert!(each[0] == each[1], "{each:?}");
        world.stencil(&["stop", "--all"]).ok();
        assert_eq!(overlays(&world.dir().join(disk_dir)), Vec::<PathBuf>::new());
    }
}
