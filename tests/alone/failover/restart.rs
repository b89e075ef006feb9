//! Restarts of the server and of the supervisor under readers, also with another program.

use std::fs::{self, File};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use stencilfs::sys::process::ProcessId;

use crate::failover::restart::{IMAGE, Load};
use crate::support::actor::Actor;
use crate::support::daemon::drill::Drill;
use crate::support::daemon::readers::PAGE;
use crate::support::host;
use crate::support::mount::{TestMount, copy_program, daemon, wait_for};

#[test]
fn soak_readers_survive_restarts_of_the_server() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut load = Load::on(&world);
        let other = world.dir().join("another-mountd");
        copy_program(daemon(), &other);
        let supervisor = world.status()["supervisor_pid"].clone();
        for round in 0..host::rounds(4, 25) {
            let before = world.server();
            let program = if round % 2 == 0 { other.clone() } else { daemon() };
            load.restart(&program, false).ok();
            let status = world.status();
            assert_ne!(status["server_pid"], before);
            assert_eq!(status["supervisor_pid"], supervisor);
            assert_eq!(status["server_program"], program.to_str().unwrap());
            load.goes_on();
        }
        load.end(&format!("{serve}: restarted servers"));
    }
}

#[test]
fn soak_readers_survive_reexecs_of_the_supervisor() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut load = Load::on(&world);
        let supervisor = world.status()["supervisor_pid"].clone();
        for _ in 0..host::rounds(4, 25) {
            let before = world.server();
            world.stencil(&["restart", load.mountpoint()]).ok();
            let status = world.status();
            assert_ne!(status["server_pid"], before);
            assert_eq!(status["supervisor_pid"], supervisor, "the supervisor keeps its PID");
            load.goes_on();
            // The re-executed supervisor still restarts its servers.
            Drill::new(&world).kill();
            load.goes_on();
        }
        load.end(&format!("{serve}: supervisor re-executed, then the server killed"));
    }
}

#[test]
fn soak_readers_survive_a_killed_and_replaced_supervisor() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::with(&["--serve", serve]);
        let mut load = Load::on(&world);
        for _ in 0..host::rounds(4, 25) {
            let server = world.server();
            let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
            let process = ProcessId::of(supervisor).unwrap().unwrap();
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap());
            load.goes_on();
            world.mount(&["--serve", serve]).ok();
            assert_eq!(world.server(), server, "the successor did not take over the running server");
            assert_ne!(world.status()["supervisor_pid"], supervisor);
            load.goes_on();
            Drill::new(&world).kill();
            load.goes_on();
            assert_ne!(world.server(), server);
        }
        load.end(&format!("{serve}: supervisor killed and replaced, then the server killed"));
    }
}

#[test]
fn mounting_again_recovers_a_mount_with_killed_daemons() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
        clone.tell("hash 0 3");
        for process in world.processes() {
            process.signal(Signal::KILL).unwrap();
            assert!(process.wait_for_exit(Duration::from_secs(10)).unwrap());
        }
        assert_eq!(File::open(&path).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        world.mount(&["--serve", serve]).ok();
        assert!(fs::read(&path).unwrap() == IMAGE.bytes(), "new opens are served");
        let status = world.status_of_all();
        assert_eq!(status["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(
            (&status["silent"][0]["state"], &status["silent"][0]["clones"]),
            (&json!("dead"), &json!(1))
        );
        // The old FUSE connection cannot be recovered, but passthrough mappings do not need it.
        assert_eq!(clone.tell("hash 0 3"), IMAGE.hash(3));
        if serve == "passthrough" {
            for page in 0..IMAGE.pages {
                assert_eq!(clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page));
            }
        }
        wait_for("one supervisor and one server", || (world.processes().len() == 2).then_some(()));
    }
}
