//! What `--store` means for commands about processes and mounts: only that store's; all stores without it; exit 4 for one
//! that is not there.

use serde_json::Value;

use crate::support::host;
use crate::support::mount::{Run, TestMount, wait_for};
use crate::support::store::guest_like;

/// Two stores with a mount each, in one runtime directory.
struct Two {
    first: TestMount,
    second: TestMount,
}

impl Two {
    fn new() -> Two {
        let (first, second) = (TestMount::new("decode"), TestMount::unmounted());
        let two = Two { first, second };
        for (world, seed) in [(&two.first, 1), (&two.second, 2)] {
            world.import_bytes(&guest_like(seed, 1 << 20), "web:1");
        }
        two.of(&two.second, &["mount", two.second.mountpoint().to_str().unwrap(), "--serve", "decode"]).ok();
        for world in [&two.first, &two.second] {
            two.of(world, &["clone", "web:1", "--simulate", "read=10%,write=1%", "-n", "2"]).ok();
        }
        two
    }

    /// With that world's store, in the runtime directory of the first.
    fn of(&self, world: &TestMount, words: &[&str]) -> Run {
        let mut command = world.command();
        command.env("STENCIL_RUNTIME_DIR", self.first.runtime_dir()).args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    }

    /// Without a named store.
    fn of_all(&self, words: &[&str]) -> Run {
        let mut command = self.first.command();
        command.env_remove("STENCIL_STORE").args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        self.of_all(&["stop", "--all"]);
        self.of_all(&["umount", "--force", self.second.mountpoint().to_str().unwrap()]);
    }
}

fn json(run: Run) -> Value {
    serde_json::from_str(&run.ok().out).unwrap()
}

fn count(answer: &Value, rows: &str) -> usize {
    answer[rows].as_array().unwrap().len()
}

#[test]
fn commands_about_processes_are_about_the_named_store() {
    let _host = host::shared();
    let two = Two::new();
    for (world, other) in [(&two.first, &two.second), (&two.second, &two.first)] {
        let ps = json(two.of(world, &["--json", "ps"]));
        assert_eq!(count(&ps, "clones"), 2, "{ps:#}");
        let density = json(two.of(world, &["--json", "density"]));
        assert_eq!(count(&density, "clones"), 2, "{density:#}");
        let status = json(two.of(world, &["--json", "status"]));
        assert_eq!(count(&status, "mounts"), 1);
        assert_eq!(status["mounts"][0]["mountpoint"], world.mountpoint().to_str().unwrap());
        let foreign = json(two.of(other, &["--json", "ps"]))["clones"][0]["id"].as_str().unwrap().to_owned();
        two.of(world, &["stop", &foreign]).exits(4).says("not of the store that was named");
    }
    assert_eq!(count(&json(two.of_all(&["--json", "ps"])), "clones"), 4);
    assert_eq!(count(&json(two.of_all(&["--json", "density"])), "clones"), 4);
    assert_eq!(count(&json(two.of_all(&["--json", "status"])), "mounts"), 2);
    let servers = |world| json(two.of(world, &["--json", "status"]))["mounts"][0]["server_pid"].clone();
    let before = servers(&two.second);
    let restarted = json(two.of(&two.first, &["--json", "restart", "--all"]));
    assert_eq!(count(&restarted, "mounts"), 1);
    assert_eq!(servers(&two.second), before);

    let nothing = two.first.dir().join("nothing");
    let nothing = nothing.to_str().unwrap();
    for words in [&["ps"][..], &["density"], &["status"], &["stop", "--all"], &["restart", "--all"]] {
        two.of_all(&[&["--store", nothing], words].concat()).exits(4);
    }
    assert_eq!(count(&json(two.of_all(&["--json", "ps"])), "clones"), 4);

    assert_eq!(count(&json(two.of(&two.first, &["--json", "stop", "--all"])), "stopped"), 2);
    assert_eq!(count(&json(two.of(&two.second, &["--json", "ps"])), "clones"), 2);
    assert_eq!(count(&json(two.of(&two.first, &["--json", "ps"])), "clones"), 0);
    // A store that is away is still the one of its mount.
    let away = two.second.dir().join("away");
    std::fs::rename(two.second.store_dir(), &away).unwrap();
    let told = two.of(&two.second, &["--json", "status"]);
    std::fs::rename(&away, two.second.store_dir()).unwrap();
    assert_eq!(count(&json(told), "mounts"), 1);
    assert_eq!(count(&json(two.of_all(&["--json", "stop", "--all"])), "stopped"), 2);
}

/// What each command says of a mount that has lost its supervisor, and of one that has lost both processes.
#[test]
fn a_mount_that_has_lost_its_processes_is_named_with_what_to_do() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let mnt = world.mountpoint().to_str().unwrap();
    let status = world.status();
    let number = |field: &str| status[field].as_u64().unwrap();
    let kill = |pid: u64| {
        let process = stencilfs::sys::process::ProcessId::of(pid as u32).unwrap().unwrap();
        process.signal(rustix::process::Signal::KILL).unwrap();
        wait_for("its end", || (!process.is_alive()).then_some(()));
    };
    kill(number("supervisor_pid"));
    let lost = world.stencil(&["status"]).exits(6).out;
    let server = format!("its server, process {}, still serves", number("server_pid"));
    assert!(lost.contains(&format!("process {} is dead", number("supervisor_pid"))), "{lost}");
    assert!(lost.contains(&server) && lost.contains(&format!("stencil mount {mnt}")), "{lost}");
    let answer: Value = serde_json::from_str(&world.stencil(&["--json", "status"]).exits(6).out).unwrap();
    assert_eq!(answer["silent"][0]["state"], "no-supervisor");
    // What it says is the way out.
    world.mount(&[]).ok();
    world.stencil(&["status"]).ok();

    let server = u64::from(world.server());
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap();
    kill(supervisor);
    kill(server);
    for _ in 0..2 {
        let dead = world.stencil(&["status"]).exits(6).out;
        assert!(dead.contains("the mount is dead") && dead.contains(mnt), "{dead}");
        assert!(dead.contains(&format!("stencil umount {mnt}")), "{dead}");
    }
    let answer: Value = serde_json::from_str(&world.stencil(&["--json", "status"]).exits(6).out).unwrap();
    assert_eq!(answer["silent"][0]["state"], "dead");
    world.stencil(&["rm", "web:1"]).exits(75).says("the mount is dead");
    assert!(world.stencil(&["doctor"]).out.contains("the mount is dead"));
    world.mount(&["--serve", "decode"]).ok();
    world.stencil(&["status"]).ok();
    assert_eq!(std::fs::read_dir(world.runtime_dir().join("mounts")).unwrap().count(), 1);

    let server = u64::from(world.server());
    kill(world.status()["supervisor_pid"].as_u64().unwrap());
    kill(server);
    world.stencil(&["umount", mnt]).ok();
    assert_eq!(world.stencil(&["status"]).ok().out, "no mounts\n");
    assert_eq!(std::fs::read_dir(world.runtime_dir().join("mounts")).unwrap().count(), 0);
}
