//! Servers that are killed while backings are created, files promoted, and templates imported and removed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stencilfs::control::Phase;

use crate::support::actor::Actor;
use crate::support::daemon::drill::Drill;
use crate::support::daemon::readers::{Image, PAGE, Readers};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

const PAGES: u64 = 4 << 10;

fn image(salt: u64) -> Image {
    Image { salt, pages: PAGES }
}

/// Kills servers until `work` returns, and returns its result. The intervals are 0.2 to 4.2 times `pause`, and grow
/// with the rounds. After 300 s the mount is aborted, so that `work` returns, and the test fails.
fn kill_during<T: Send>(drill: &mut Drill<'_>, pause: Duration, work: impl FnOnce() -> T + Send) -> T {
    let world = drill.world();
    std::thread::scope(|scope| {
        let work = scope.spawn(work);
        let deadline = Instant::now() + Duration::from_secs(300);
        for round in 0u64.. {
            // A backing can be completed in the longer intervals, on a slow host only in later rounds.
            let factor = (0.2 + (round * 7919 % 100) as f64 / 25.0) * (1 + round / 30) as f64;
            std::thread::sleep(pause.mul_f64(factor));
            if work.is_finished() {
                break;
            }
            if Instant::now() > deadline {
                world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]);
                panic!("a request was not answered for 300 s");
            }
            // A server that dies before it serves is restarted after a pause: frequent kills would then leave no time
            // to serve.
            wait_for("a server that serves", || world.status()["server_version"].as_str().map(drop));
            drill.kill();
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Opens the template for the first time, in three threads, and compares all of its content.
fn open_and_compare(path: &Path, expected: &[u8]) {
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| fs::read(path))).collect();
        for reader in readers {
            assert!(reader.join().unwrap().expect("the open succeeds in the end") == expected);
        }
    });
}

#[test]
fn first_opens_survive_server_kills_during_hydration() {
    let _host = host::alone();
    let world = TestMount::new("passthrough");
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(6, 25) {
        let bytes = image(round).bytes();
        let digest = world.import_bytes(&bytes, &format!("web:{round}"));
        let path = world.file(&digest, "memory");
        std::thread::scope(|scope| {
            let opens = scope.spawn(|| open_and_compare(&path, &bytes));
            // The kills come at the start of the hydration, and while the backing is filled, frozen, verified or
            // registered.
            for kill in 0..3 {
                if drill.kill_when(Duration::from_millis(500), |r| r.phase == Phase::Parked).is_none() {
                    break;
                }
                std::thread::sleep(Duration::from_micros((round * 3 + kill) * 7919 % 30_000));
            }
            let deadline = Instant::now() + Duration::from_secs(30);
            while !opens.is_finished() {
                if Instant::now() > deadline {
                    world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]);
                    panic!("an open was not answered for 30 s");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            opens.join().unwrap();
        });
        assert_eq!(world.stencil(&["rm", &format!("web:{round}")]).code, 0);
    }
    drill.report("first open, hydration", &[]);
    let parked = drill.kills().iter().filter(|k| k.met.iter().any(|r| r.phase == Phase::Parked)).count();
    println!("{parked} kills hit an open that waited for its backing");
    assert!(parked >= host::rounds(6, 25), "only {parked} kills hit a waiting open");
}

#[test]
fn promotion_completes_despite_server_kills() {
    let _host = host::alone();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "0"]);
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(4, 20) {
        let image = image(1000 + round);
        let digest = world.import_bytes(&image.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut readers = Readers::new(world.dir(), Duration::from_micros(100));
        let early_file = File::open(&path).unwrap();
        readers.apart(&["map", "direct"], image, &path);
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
        let decode_ino = early_file.metadata().unwrap().ino();
        // Each open checks whether the backing exists; each server starts the hydration again.
        let last_ino = kill_during(&mut drill, Duration::from_millis(60), || {
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                let ino = File::open(&path).unwrap().metadata().unwrap().ino();
                if ino != decode_ino || Instant::now() > deadline {
                    return ino;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_ne!(last_ino, decode_ino, "the template is not promoted despite 60 s of opens");
        for page in 0..PAGES {
            assert_eq!(clone.tell(&format!("hash 0 {page}")), image.hash(page), "page {page}");
        }
        assert!(fs::read(&path).unwrap() == image.bytes());
        readers.finish();
    }
    drill.report("promotion", &[]);
}

#[test]
fn imports_and_removals_succeed_despite_server_kills() {
    let _host = host::alone();
    // With passthrough a round takes longer, since a backing is created.
    for (serve, pause) in [("decode", 20), ("passthrough", 60)] {
        let world = TestMount::new(serve);
        let mut drill = Drill::new(&world);
        let rounds = host::rounds(4, 20);
        kill_during(&mut drill, Duration::from_millis(pause), || {
            for round in 0..rounds {
                let image = image(2000 + round);
                let bytes = image.bytes();
                let digest = world.import_bytes(&bytes, "web:1");
                let by_name: PathBuf = world.mountpoint().join("templates/web/1/memory");
                let path = world.file(&digest, "memory");
                open_and_compare(&by_name, &bytes);
                let mut clone = Actor::start();
                clone.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
                // A mapped template is not removed; an unused one is.
                world.stencil(&["rm", "web:1"]).exits(5);
                for page in (0..PAGES).step_by(7) {
                    assert_eq!(clone.tell(&format!("hash 0 {page}")), image.hash(page), "page {page}");
                }
                drop(clone);
                world.stencil(&["rm", "web:1"]).ok();
                assert_eq!(File::open(&path).unwrap_err().raw_os_error(), Some(libc::ENOENT));
                assert_eq!(File::open(&by_name).unwrap_err().raw_os_error(), Some(libc::ENOENT));
            }
        });
        drill.report(&format!("import, rm, {serve}"), &[]);
        assert!(drill.kills().len() as u64 >= rounds, "{} kills", drill.kills().len());
    }
}
