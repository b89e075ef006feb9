//! `--store` for commands about processes and mounts: with the option they cover only that store, without it all
//! stores; a missing store gives exit code 4.

use serde_json::Value;

use crate::support::host;
use crate::support::mount::{Run, TestMount, wait_for};
use crate::support::store::guest_like;

/// Two mounted stores with one runtime directory.
struct TwoStores {
    first: TestMount,
    second: TestMount,
}

impl TwoStores {
    fn new() -> TwoStores {
        let (first, second) = (TestMount::new("decode"), TestMount::unmounted());
        let stores = TwoStores { first, second };
        for (world, seed) in [(&stores.first, 1), (&stores.second, 2)] {
            world.import_bytes(&guest_like(seed, 1 << 20), "web:1");
        }
        stores
            .of(&stores.second, &["mount", stores.second.mountpoint().to_str().unwrap(), "--serve", "decode"])
            .ok();
        for world in [&stores.first, &stores.second] {
            stores.of(world, &["clone", "web:1", "--simulate", "read=10%,write=1%", "-n", "2"]).ok();
        }
        stores
    }

    /// Runs `stencil` with the store of `world` and the runtime directory of the first mount.
    fn of(&self, world: &TestMount, words: &[&str]) -> Run {
        let mut command = world.command();
        command.env("STENCIL_RUNTIME_DIR", self.first.runtime_dir()).args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    }

    /// Runs `stencil` without a store.
    fn of_all(&self, words: &[&str]) -> Run {
        let mut command = self.first.command();
        command.env_remove("STENCIL_STORE").args(words);
        Run::of(words.join(" "), &command.output().unwrap())
    }
}

impl Drop for TwoStores {
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
fn process_commands_cover_only_the_given_store() {
    let _host = host::shared();
    let stores = TwoStores::new();
    for (world, other) in [(&stores.first, &stores.second), (&stores.second, &stores.first)] {
        let ps = json(stores.of(world, &["--json", "ps"]));
        assert_eq!(count(&ps, "clones"), 2, "{ps:#}");
        let density = json(stores.of(world, &["--json", "density"]));
        assert_eq!(count(&density, "clones"), 2, "{density:#}");
        let status = json(stores.of(world, &["--json", "status"]));
        assert_eq!(count(&status, "mounts"), 1);
        assert_eq!(status["mounts"][0]["mountpoint"], world.mountpoint().to_str().unwrap());
        let other_clone =
            json(stores.of(other, &["--json", "ps"]))["clones"][0]["id"].as_str().unwrap().to_owned();
        stores.of(world, &["stop", &other_clone]).exits(4).says("not of the given store");
    }
    assert_eq!(count(&json(stores.of_all(&["--json", "ps"])), "clones"), 4);
    assert_eq!(count(&json(stores.of_all(&["--json", "density"])), "clones"), 4);
    assert_eq!(count(&json(stores.of_all(&["--json", "status"])), "mounts"), 2);
    let servers = |world| json(stores.of(world, &["--json", "status"]))["mounts"][0]["server_pid"].clone();
    let before = servers(&stores.second);
    let restarted = json(stores.of(&stores.first, &["--json", "restart", "--all"]));
    assert_eq!(count(&restarted, "mounts"), 1);
    assert_eq!(servers(&stores.second), before);

    let nothing = stores.first.dir().join("nothing");
    let nothing = nothing.to_str().unwrap();
    for words in [&["ps"][..], &["density"], &["status"], &["stop", "--all"], &["restart", "--all"]] {
        stores.of_all(&[&["--store", nothing], words].concat()).exits(4);
    }
    assert_eq!(count(&json(stores.of_all(&["--json", "ps"])), "clones"), 4);

    assert_eq!(count(&json(stores.of(&stores.first, &["--json", "stop", "--all"])), "stopped"), 2);
    assert_eq!(count(&json(stores.of(&stores.second, &["--json", "ps"])), "clones"), 2);
    assert_eq!(count(&json(stores.of(&stores.first, &["--json", "ps"])), "clones"), 0);
    // A mount still belongs to a store that has been moved away.
    let away = stores.second.dir().join("away");
    std::fs::rename(stores.second.store_dir(), &away).unwrap();
    let told = stores.of(&stores.second, &["--json", "status"]);
    std::fs::rename(&away, stores.second.store_dir()).unwrap();
    assert_eq!(count(&json(told), "mounts"), 1);
    assert_eq!(count(&json(stores.of_all(&["--json", "stop", "--all"])), "stopped"), 2);
}

/// The output of each command for a mount that has lost its supervisor, and for a mount that has lost both processes.
#[test]
fn commands_report_a_mount_without_processes_and_a_remedy() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    world.import_bytes(&guest_like(1, 1 << 20), "web:1");
    let mnt = world.mountpoint().to_str().unwrap();
    let status = world.status();
    let number = |field: &str| status[field].as_u64().unwrap();
    let kill = |pid: u64| {
        let process = stencilfs::sys::process::ProcessId::of(pid as u32).unwrap().unwrap();
        process.signal(rustix::process::Signal::KILL).unwrap();
        wait_for("the exit of a killed process", || (!process.is_alive()).then_some(()));
    };
    kill(number("supervisor_pid"));
    let lost = world.stencil(&["status"]).exits(6).out;
    let server = format!("its server, process {}, still serves", number("server_pid"));
    assert!(lost.contains(&format!("process {} is dead", number("supervisor_pid"))), "{lost}");
    assert!(lost.contains(&server) && lost.contains(&format!("stencil mount {mnt}")), "{lost}");
    let answer: Value = serde_json::from_str(&world.stencil(&["--json", "status"]).exits(6).out).unwrap();
    assert_eq!(answer["silent"][0]["state"], "no-supervisor");
    // The suggested command repairs the mount.
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
