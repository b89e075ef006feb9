use std::sync::Mutex;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stencilfs::control::ServeMode;

use super::*;
use crate::server::refusal::Refusal;
use crate::server::testing::{Setup, World, reply, snapshot, wait_for};

/// Returns three values: a world whose supervisor records each report; the ledger; the kernel's end of the watcher's
/// connection.
fn watched() -> (World, Arc<Mutex<ledger::Ledger>>, OwnedFd) {
    let world = World::with(Setup::new(ServeMode::Auto));
    let ledger = ledger::Ledger::create().unwrap();
    let (ours, kernel) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let watcher = Watcher {
        condemned: Arc::clone(&world.fs.condemned),
        tree: Arc::clone(&world.fs.tree),
        backings: Arc::clone(&world.fs.backings),
        store: world.store.clone(),
        fuse: ours,
        ledger: ledger.read_only().unwrap(),
        stats: world.fs.stats.clone(),
        link: Arc::clone(&world.link),
    };
    watcher.start(world.fs.stats.page().rings());
    (world, Arc::new(Mutex::new(ledger)), kernel)
}

fn reports(world: &World) -> Vec<(u32, u64)> {
    let requests = world.supervisor.requests.lock().unwrap();
    let report = |request: &ServerRequest| match request {
        ServerRequest::Condemned { ring, grace_ms } => Some((*ring, *grace_ms)),
        _ => None,
    };
    requests.iter().filter_map(report).collect()
}

#[test]
fn the_report_follows_the_application_of_the_new_list() {
    let (world, ledger, kernel) = watched();
    let ino = world.memory_ino();
    assert!(reply(&world.open(ino)).is_ok());
    let publish = |removed: Option<bool>| {
        let text = serde_json::to_vec(&snapshot(&world, removed)).unwrap();
        ledger.lock().unwrap().write(&text).unwrap();
        world.fs.stats.page().ring();
    };
    publish(Some(false));
    let first = wait_for("a report", || reports(&world).pop());
    assert_eq!(first.0, world.fs.stats.page().rings());
    assert_eq!(world.find(&format!("by-id/{}", world.digest)), Err(Refusal::NoEntry));
    assert_eq!(reply(&world.open(ino)), Err(Refusal::Stale));
    // The watcher has sent the kernel a notification to invalidate the name.
    let mut packet = vec![0; 4096];
    let length = rustix::io::read(&kernel, &mut packet[..]).unwrap();
    assert!(packet[..length].windows(6).any(|name| name == b"memory"), "no notification about the name");
    publish(None);
    wait_for("the second report", || (reports(&world).len() == 2).then_some(()));
    assert!(reply(&world.open(ino)).is_ok());
}

#[test]
fn a_reader_of_the_old_list_delays_the_report_but_not_a_newer_list() {
    let (world, ledger, _kernel) = watched();
    let guard = world.fs.condemned.guard();
    let publish = |removed: Option<bool>| {
        let text = serde_json::to_vec(&snapshot(&world, removed)).unwrap();
        ledger.lock().unwrap().write(&text).unwrap();
        world.fs.stats.page().ring();
    };
    publish(Some(false));
    wait_for("the list", || world.fs.condemned.holds(&world.digest).then_some(()));
    assert_eq!(reports(&world), []);
    publish(None);
    wait_for("the newer list", || (!world.fs.condemned.holds(&world.digest)).then_some(()));
    assert_eq!(reports(&world), []);
    drop(guard);
    let report = wait_for("a report", || reports(&world).pop());
    assert_eq!(report.0, world.fs.stats.page().rings(), "the report is about the newest list");
}
