//! The in-flight table shows the requests that a server has read and not replied to, even while the server is stopped.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::control::{Op, Phase};
use stencilfs::sys::process::ProcessId;

use crate::support::daemon::inflight::table_of;
use crate::support::daemon::passing::{SetOnDrop, StoppedProcess};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

const PAGE: u64 = 4096;
const PAGES: u64 = 8 << 10;

fn is_stopped(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    })
}

#[test]
fn a_stopped_server_still_shows_its_pending_requests() {
    let _host = host::shared();
    shows_pending_requests_of_a_stopped_server(&TestMount::new("decode"));
}

/// The table has host times, whatever time namespace the server runs in.
#[test]
fn pending_requests_have_host_times_in_any_time_namespace() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.in_other_time_namespace(&["mount", world.mountpoint().to_str().unwrap(), "--serve", "decode"]).ok();
    shows_pending_requests_of_a_stopped_server(&world);
}

fn shows_pending_requests_of_a_stopped_server(world: &TestMount) {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let ino = std::fs::metadata(&path).unwrap().ino();
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    let table = table_of(server.pid);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let (stop, path) = (&stop, &path);
            scope.spawn(move || {
                let mut page = vec![0; PAGE as usize];
                while !stop.load(Ordering::Relaxed) {
                    let file = File::open(path).unwrap();
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
                    for i in 0..PAGES {
                        file.read_exact_at(&mut page, (i * 6151 + reader * 977) % PAGES * PAGE).unwrap();
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                }
            });
        }
        let ends = SetOnDrop(&stop);
        let mut decoding = 0;
        for _ in 0..400 {
            server.signal(Signal::STOP).unwrap();
            wait_for("all threads of the server to stop", || is_stopped(server.pid).then_some(()));
            let first: Vec<_> = table.requests().collect();
            std::thread::sleep(Duration::from_millis(3));
            let found: Vec<_> = table.requests().collect();
            let oldest = table.oldest();
            server.signal(Signal::CONT).unwrap();
            for (request, before) in found.iter().zip(&first) {
                assert_eq!((request.unique, request.phase), (before.unique, before.phase));
                assert!(request.age > before.age && request.still > before.still, "{before:?}, {request:?}");
                assert!(request.age >= request.still && request.age < Duration::from_secs(2), "{request:?}");
                if request.opcode == Op::Read as u32 {
                    assert_eq!(request.ino, ino, "{request:?}");
                    assert!(request.offset + u64::from(request.size) <= PAGES * PAGE, "{request:?}");
                    assert!(request.size >= PAGE as u32, "{request:?}");
                    decoding += u32::from(request.phase == Phase::Decoding);
                }
            }
            assert_eq!(oldest.map(|r| r.unique), found.iter().max_by_key(|r| r.age).map(|r| r.unique));
            if decoding >= 5 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(ends);
        assert!(decoding >= 5, "only {decoding} READs were seen in the decoding phase");
    });
    wait_for("an empty table", || table.oldest().is_none().then_some(()));
    assert_eq!(table.parked(), 0);
}

#[test]
fn an_open_that_waits_for_its_backing_is_parked() {
    let _host = host::shared();
    let world = TestMount::with(&["--serve", "passthrough", "--watchdog", "0"]);
    let mut bytes = vec![0; 96 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let digest = world.import_bytes(&bytes, "web:1");
    let path = world.file(&digest, "memory");
    let ino = std::fs::metadata(&path).unwrap().ino();
    let table = table_of(world.server());
    std::thread::scope(|scope| {
        // The supervisor creates the backings: no open can complete while the supervisor is stopped.
        let supervisor = StoppedProcess::stop(world.processes()[0]);
        let openers: Vec<_> = (0..3).map(|_| scope.spawn(|| File::open(&path).map(drop))).collect();
        let parked = wait_for("a parked open", || table.requests().find(|r| r.phase == Phase::Parked));
        assert_eq!((parked.opcode, parked.ino), (Op::Open as u32, ino), "{parked}");
        assert!(
            table.oldest().is_none_or(|r| r.unique != parked.unique),
            "a parked open must not occupy a server thread"
        );
        drop(supervisor);
        for opener in openers {
            opener.join().unwrap().unwrap();
        }
    });
    wait_for("an empty table", || (table.parked() == 0).then_some(()));
}
