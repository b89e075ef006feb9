//! A compromised server that floods its supervisor with requests: the supervisor keeps running, responds to all other
//! callers, and stays within its memory limits.

use std::fs;
use std::time::Duration;

use serde_json::json;
use stencilfs::control::Channel;
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::daemon::readers::{Image, PAGE};
use crate::support::mount::{TestMount, wait_for};
use crate::support::{daemon::link, host};

pub const IMAGE: Image = Image { salt: 13, pages: 2 << 10 };

/// Longest time for a response of the supervisor to another caller, also on a loaded host.
pub const ANSWER: Duration = Duration::from_secs(5);

/// A mount with a clone, and a duplicate of the server's end of the link to the supervisor.
pub struct World {
    pub world: TestMount,
    pub clone: Actor,
    supervisor: ProcessId,
    pub server: ProcessId,
    pub link: Channel,
}

pub fn world() -> World {
    let world = TestMount::with(&["--serve", "auto", "--cache-size", "64M"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let mut clone = Actor::start();
    let path = world.file(&digest, "memory");
    clone.tell(&format!("map 0 {} 0 {} rw", path.display(), IMAGE.pages * PAGE));
    let process = |pid: u32| ProcessId::of(pid).unwrap().unwrap();
    let supervisor = process(world.status()["supervisor_pid"].as_u64().unwrap() as u32);
    let server = process(world.server());
    let link = link::link_of(server.pid);
    link.set_timeout(Duration::from_millis(500)).unwrap();
    World { world, clone, supervisor, server, link }
}

impl World {
    /// Resident memory of the supervisor in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.supervisor.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Asserts that the supervisor replaces the server with `message` in its log, and that neither the clone nor new
    /// opens are affected.
    pub fn gives_way(mut self, message: &str) {
        let log = || self.world.log();
        wait_for("another server", || (self.world.server() != self.server.pid).then_some(()));
        assert!(log().contains(message), "'{message}' is not in: {}", log());
        assert!(self.server.wait_for_exit(Duration::from_secs(10)).unwrap(), "the old server must exit");
        assert_eq!(self.world.status()["supervisor_pid"], self.supervisor.pid);
        for page in 0..IMAGE.pages {
            assert_eq!(self.clone.tell(&format!("hash 0 {page}")), IMAGE.hash(page), "page {page}");
        }
        let next = Image { salt: 14, ..IMAGE };
        let digest = self.world.import_bytes(&next.bytes(), "web:2");
        assert!(
            fs::read(self.world.file(&digest, "memory")).unwrap() == next.bytes(),
            "the new server must serve new opens"
        );
    }
}

#[test]
fn a_server_that_reads_no_replies_is_replaced() {
    let _host = host::shared();
    let hostile = world();
    hostile.server.signal(rustix::process::Signal::STOP).unwrap();
    for number in 1_000_000u64..1_100_000 {
        let body = json!({ "progress": { "key": link::absent_key(1), "bytes": number } });
        match hostile.link.send(&link::request(number, &body), None) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            // The supervisor has closed the link.
            Err(_) => break,
        }
    }
    hostile.gives_way("cannot send a reply to the server");
}

#[test]
fn a_server_that_does_not_wait_for_replies_is_replaced() {
    let _host = host::shared();
    let hostile = world();
    hostile.server.signal(rustix::process::Signal::STOP).unwrap();
    // The scan for users of the backing takes a while; the server must not send further evictions until the reply.
    let evict = json!({ "evict": { "keys": [link::absent_key(1)] } });
    for number in 1_000_000u64..1_000_002 {
        hostile.link.send(&link::request(number, &evict), None).unwrap();
    }
    hostile.gives_way("the server sends requests without waiting for replies");
}
