//! Resident bytes are reported for the right template: while other templates are removed, and by a server whose
//! supervisor has died.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use stencilfs::control::{Mount, Record, Request, Response};

use crate::clones::accounting::assert_sums;
use crate::support::actor::Actor;
use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::random;

const BLOCK: usize = 64 << 10;

/// The mount of a scenario, with the fields that `stencil density` reads from its record.
fn mount_of(world: &TestMount) -> Mount {
    let dir = fs::read_dir(world.runtime_dir().join("mounts")).unwrap().next().unwrap().unwrap().path();
    let record: Record = serde_json::from_slice(&fs::read(dir.join("mount.json")).unwrap()).unwrap();
    Mount {
        mountpoint: record.mountpoint,
        store: record.store,
        store_id: record.store_id,
        device: record.device,
        supervisor_pid: record.supervisor_pid,
        server_pid: record.server_pid,
        detached: false,
        orphaned: false,
        foreign: false,
        identities: [record.ledger, record.program],
        dir,
    }
}

#[test]
fn residency_stays_correct_during_removals() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    // Backings of different sizes; the removed backings precede the remaining one in the supervisor's list.
    let sizes: Vec<usize> = (1..=24).map(|blocks| blocks * BLOCK).chain([64 * BLOCK]).collect();
    let mut sizes_by_digest = BTreeMap::new();
    for (number, size) in sizes.iter().enumerate() {
        let digest = world.import_bytes(&random(number as u64, *size), &format!("t{number}"));
        assert_eq!(fs::read(world.file(&digest, "memory")).unwrap().len(), *size);
        sizes_by_digest.insert(digest, *size as u64);
    }
    let mount = mount_of(&world);
    // Lock the pages: the kernel may reclaim unused ones (DAMON does so on an idle host).
    let (control, mut locker) = (world.control(), Actor::start());
    for (index, size) in sizes.iter().enumerate() {
        control.send(&Request::Backing { index }, None).unwrap();
        let (_, backing) = control.receive::<Response>().unwrap().unwrap();
        let backing = File::from(backing.expect("each template must have a backing"));
        assert_eq!(backing.metadata().unwrap().len(), *size as u64, "backings must be listed by age");
        let path = format!("/proc/{}/fd/{}", std::process::id(), backing.as_raw_fd());
        locker.tell(&format!("shared {index} {path} 0 {size}"));
        locker.tell(&format!("lock {index} {size}"));
    }
    assert_eq!(mount.residency().unwrap().len(), sizes.len());
    let last = sizes_by_digest.iter().max_by_key(|(_, size)| **size).unwrap().0.clone();
    let done = AtomicBool::new(false);
    let queries = AtomicUsize::new(0);
    let is_done = || done.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let _ends = SetOnDrop(&done);
        scope.spawn(|| {
            let _ends = SetOnDrop(&done);
            for number in 0..sizes.len() - 1 {
                // At least one query per removal.
                while queries.load(Ordering::Relaxed) < number && !is_done() {
                    std::thread::yield_now();
                }
                world.stencil(&["rm", &format!("t{number}")]).ok();
            }
        });
        while !is_done() {
            let rows = mount.residency().unwrap();
            let reported: BTreeMap<String, u64> =
                rows.iter().map(|row| (row.digest.to_string(), row.resident_bytes.get())).collect();
            let wrong: Vec<_> =
                reported.iter().filter(|(digest, bytes)| sizes_by_digest[*digest] != **bytes).collect();
            assert!(wrong.is_empty(), "{wrong:?} of {sizes_by_digest:#?}");
            assert!(reported.contains_key(&last), "the remaining template must be reported: {reported:#?}");
            queries.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(mount.residency().unwrap().len(), 1);
    let density = world.json(&["density"]);
    assert_eq!(density["totals"]["template_bytes"], 64 * BLOCK);
}

#[test]
fn density_counts_a_mount_whose_supervisor_has_died() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        let digest = world.import_bytes(&random(1, 64 * BLOCK), "web");
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 64 * BLOCK));
        clone.read_pages(0, 0..(64 * BLOCK as u64 / 4096));
        clone.write_pages(0, 0..10);
        let figures = || {
            let density = world.json(&["density"]);
            assert_sums(&density);
            let template = |field: &str| density["templates"][0][field].clone();
            let totals = |field: &str| density["totals"][field].clone();
            let all: [Value; 4] = [
                template("resident_bytes"),
                template("serving"),
                totals("template_bytes"),
                totals("private_bytes"),
            ];
            all
        };
        let before = figures();
        assert_eq!(before[0], 64 * BLOCK, "{before:?}");
        let supervisor = world.processes()[0];
        supervisor.signal(Signal::KILL).unwrap();
        assert!(supervisor.wait_for_exit(Duration::from_secs(10)).unwrap());
        assert_eq!(figures(), before, "{serve}");
        world.mount(&["--serve", serve]).ok();
        assert_eq!(figures(), before, "{serve}");
    }
}

/// A restarted container may find the record of its predecessor, whose PID namespace and mount have ended: `density`
/// must work all the same.
#[test]
fn density_ignores_records_of_ended_pid_namespaces() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let record = world.runtime_dir().join("mounts/1-1");
    fs::create_dir(&record).unwrap();
    let mut gone = json!({
        "mountpoint": "/gone", "store": world.store_dir(), "store_id": "0", "device": 0xf_ffff, "supervisor_pid": 1, "supervisor_identity": 7,
        "server_pid": 1, "server_identity": 7, "version": "0", "ledger": [1, 1], "program": [1, 1], "pid_namespace": 1,
    });
    fs::write(record.join("mount.json"), gone.to_string()).unwrap();
    world.stencil(&["density"]).ok();
    assert!(record.exists());
    // If a FUSE connection with the device number of the record exists, the connection may belong to that mount.
    gone["device"] = world.status()["device"].clone();
    fs::write(record.join("mount.json"), gone.to_string()).unwrap();
    let refused = world.stencil(&["density"]).exits(75);
    assert!(refused.err.contains(&format!("remove {}", record.display())), "{refused:?}");
}
