//! Disks of clones: where they lie, whose RAM they take, and that they go with their clone however it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::clone_command::{nothing_is_left, processes_of};
use crate::support::guest::patiently;
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::store::random;

/// A program that maps the template, as a VMM does.
const MAPS: &str = "qemu-system-x86_64 -M none -nodefaults -display none \
                    -object memory-backend-file,id=m,size=1M,mem-path={memory},share=off,readonly=on,rom=off";

/// A tmpfs of the scenario's own.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn on(folder: &Path) -> Tmpfs {
        fs::create_dir_all(folder).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "mode=0700", "none", folder.to_str().unwrap()]);
        Tmpfs(folder.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

/// What du(1) says of these files.
pub fn du(files: &[PathBuf]) -> u64 {
    let words = ["--block-size=1", "--total"].iter().map(Into::into);
    let words: Vec<PathBuf> = words.chain(files.iter().cloned()).collect();
    run("du", &words).lines().last().unwrap().split('\t').next().unwrap().parse().unwrap()
}

/// A template with a disk.
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

fn overlays(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == "qcow2"));
    found.sort();
    found
}

#[test]
fn disks_lie_in_the_folder_that_was_asked_for_and_go_with_their_clones() {
    let _host = host::shared();
    let world = world();
    let disks = world.dir().join("disks");
    fs::create_dir(&disks).unwrap();
    let strangers = disks.join("stencil-c0000000-c0000000-root.qcow2");
    fs::write(&strangers, "somebody else's").unwrap();
    let script = format!("qemu-io -f qcow2 -c 'write 0 1M' {{disk:root}} && exec {MAPS}");
    let clone = ["clone", "web", "-n", "3", "--disk-dir", "disks", "--", "sh", "-c", &script];
    let is_there = |count: usize| {
        let found = overlays(&disks);
        assert_eq!(found.len(), count + 1, "{found:?}");
        assert_eq!(fs::read_to_string(&strangers).unwrap(), "somebody else's");
        found
    };

    let launched = world.json(&clone);
    for path in is_there(3).iter().filter(|path| **path != strangers) {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "a guest's own");
        assert!(du(std::slice::from_ref(path)) > 1 << 20, "{}", path.display());
        run("qemu-img", &["check", "-q", "-U", path.to_str().unwrap()]);
    }
    for clone in launched["clones"].as_array().unwrap() {
        assert_eq!(overlays(Path::new(clone["dir"].as_str().unwrap())), Vec::<PathBuf>::new());
        let id = clone["id"].as_str().unwrap();
        assert_eq!(is_there(3).iter().filter(|path| path.to_str().unwrap().contains(id)).count(), 1);
    }
    let first = launched["clones"][0]["id"].as_str().unwrap();
    world.stencil(&["stop", first]).ok();
    is_there(2);
    // One that was killed goes when it is stopped, as its folder does.
    let pid = launched["clones"][1]["pid"].as_i64().unwrap() as i32;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    world.stencil(&["stop", "--all"]).ok();
    is_there(0);
    nothing_is_left(&world);

    // A launcher that is killed, with its watchdog and without.
    for with_watchdog in [false, true] {
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
        is_there(3);
        for process in processes_of(&world).iter().filter(|p| with_watchdog && p.contains("launch-watchdog"))
        {
            let pid = process.split_once(' ').unwrap().0.parse().unwrap();
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        launcher.kill().unwrap();
        launcher.wait().unwrap();
        if with_watchdog {
            is_there(3);
            assert_eq!(world.json(&["ps"])["clones"], Value::Array(vec![]));
        }
        patiently("the end of the disks", Duration::from_secs(20), || {
            (overlays(&disks).len() == 1).then_some(())
        });
        patiently("the end of the launch", Duration::from_secs(20), || {
            (fs::read_dir(world.runtime_dir().join("launches")).unwrap().next().is_none()).then_some(())
        });
        is_there(0);
        nothing_is_left(&world);
    }

    let mut elsewhere = clone;
    elsewhere[5] = "nowhere";
    world.stencil(&elsewhere).exits(4);
    elsewhere[5] = "ram";
    world.stencil(&elsewhere).exits(2);
    nothing_is_left(&world);
}

#[test]
fn disks_that_lie_in_memory_are_in_the_figures() {
    let _host = host::shared();
    let world = world();
    let _tmpfs = Tmpfs::on(&world.dir().join("memory"));
    fs::create_dir(world.dir().join("disks")).unwrap();
    let write = "qemu-io -f qcow2 -c 'write 0 3M' {disk:root}";
    let own = format!("{write} && exec {MAPS}");
    // The process that maps the template is not the one in the record.
    let others = format!("{write} && {{ {MAPS} & sleep 1; echo 1 >/proc/self/fd/$STENCIL_NOTIFY; wait; }}");
    for (place, ready, script, figures) in [
        ("memory", "mapped", &own, true),
        ("memory", "notify", &others, true),
        ("disks", "mapped", &own, false),
    ] {
        world
            .stencil(&[
                "clone",
                "web",
                "-n",
                "2",
                "--disk-dir",
                place,
                "--ready",
                ready,
                "--",
                "sh",
                "-c",
                script,
            ])
            .ok();
        let density = world.json(&["density"]);
        let number = |value: &Value| value["disk_bytes"].as_u64().unwrap();
        let files = overlays(&world.dir().join(place));
        assert_eq!(files.len(), 2);
        let taken = if figures { du(&files) } else { 0 };
        assert!(taken == 0 || taken > 6 << 20, "{taken}");
        assert_eq!(number(&density["totals"]), taken, "{density:#}");
        let clones = density["clones"].as_array().unwrap();
        let each: Vec<u64> = clones.iter().map(number).collect();
        assert_eq!((each.len(), each.iter().sum::<u64>()), (2, taken), "{density:#}");
        assert!(each[0] == each[1], "{each:?}");
        world.stencil(&["stop", "--all"]).ok();
        assert_eq!(overlays(&world.dir().join(place)), Vec::<PathBuf>::new());
    }
}
