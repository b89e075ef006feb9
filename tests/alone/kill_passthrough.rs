//! Servers that are killed while backings are made, files promoted, templates imported and removed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stencilfs::control::Phase;

use crate::support::actor::Actor;
use crate::support::drill::Drill;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::readers::{Image, PAGE, Readers};

const PAGES: u64 = 4 << 10;

fn image(salt: u64) -> Image {
    Image { salt, pages: PAGES }
}

/// Kills servers, one every `pause` or so, until `work` has ended; gives what it gives. A work that never ends is
/// freed by force, and fails.
fn kills_during<T: Send>(drill: &mut Drill<'_>, pause: Duration, work: impl FnOnce() -> T + Send) -> T {
    let world = drill.world();
    std::thread::scope(|scope| {
        let work = scope.spawn(work);
        let until = Instant::now() + Duration::from_secs(300);
        for round in 0u64.. {
            // Short and long: in a long one a backing can be finished; on a slow host in a later one.
            let share = (0.2 + (round * 7919 % 100) as f64 / 25.0) * (1 + round / 30) as f64;
            std::thread::sleep(pause.mul_f64(share));
            if work.is_finished() {
                break;
            }
            if Instant::now() > until {
                world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]);
                panic!("somebody waits for ever");
            }
            // One that dies before it serves is started again after a pause, and then never comes to answer anybody.
            wait_for("a server that serves", || world.status()["server_version"].as_str().map(drop));
            drill.kill();
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The first opens of a template, each of which reads all of it.
fn open_and_compare(path: &Path, expected: &[u8]) {
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| fs::read(path))).collect();
        for reader in readers {
            assert!(reader.join().unwrap().expect("the open is answered in the end") == expected);
        }
    });
}

#[test]
fn during_the_first_open_and_the_hydration() {
    let _host = host::alone();
    let world = TestMount::new("passthrough");
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(6, 50) {
        let bytes = image(round).bytes();
        let digest = world.import_bytes(&bytes, &format!("web:{round}"));
        let path = world.file(&digest, "memory");
        std::thread::scope(|scope| {
            let opens = scope.spawn(|| open_and_compare(&path, &bytes));
            // At once, and again and again while the backing is filled, frozen, verified, registered.
            for kill in 0..3 {
                if drill.kill_when(Duration::from_millis(500), |r| r.phase == Phase::Parked).is_none() {
                    break;
                }
                std::thread::sleep(Duration::from_micros((round * 3 + kill) * 7919 % 30_000));
            }
            let until = Instant::now() + Duration::from_secs(30);
            while !opens.is_finished() {
                if Instant::now() > until {
                    world.stencil(&["umount", "--force", world.mountpoint().to_str().unwrap()]);
                    panic!("an open waits for ever");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            opens.join().unwrap();
        });
        assert_eq!(world.stencil(&["rm", &format!("web:{round}")]).code, 0);
    }
    drill.report("first open, hydration", &[]);
    let parked = drill.kills().iter().filter(|k| k.met.iter().any(|r| r.phase == Phase::Parked)).count();
    println!("{parked} kills met an open that waited for its backing");
    assert!(parked >= host::rounds(6, 50), "{parked}");
}

#[test]
fn during_the_promotion() {
    let _host = host::alone();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "0"]);
    let mut drill = Drill::new(&world);
    for round in 0..host::rounds(4, 30) {
        let image = image(1000 + round);
        let digest = world.import_bytes(&image.bytes(), "web:1");
        let path = world.file(&digest, "memory");
        let mut readers = Readers::new(world.dir(), Duration::from_micros(100));
        let early = File::open(&path).unwrap();
        readers.apart(&["map", "direct"], image, &path);
        let mut clone = Actor::start();
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
        let early = early.metadata().unwrap().ino();
        // Each open looks again; with every server the filling begins anew.
        let late = kills_during(&mut drill, Duration::from_millis(60), || {
            let until = Instant::now() + Duration::from_secs(60);
            loop {
                let ino = File::open(&path).unwrap().metadata().unwrap().ino();
                if ino != early || Instant::now() > until {
                    return ino;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_ne!(late, early, "it is promoted in spite of the kills");
        for page in 0..PAGES {
            assert_eq!(clone.tell(&format!("hash 0 {page}")), image.hash(page), "page {page}");
        }
        assert!(fs::read(&path).unwrap() == image.bytes());
        readers.finish();
    }
    drill.report("promotion", &[]);
}

#[test]
fn during_imports_and_removals() {
    let _host = host::alone();
    // A backing needs its time; by decode a round is over sooner.
    for (serve, pause) in [("decode", 20), ("passthrough", 60)] {
        let world = TestMount::new(serve);
        let mut drill = Drill::new(&world);
        let rounds = host::rounds(4, 30);
        kills_during(&mut drill, Duration::from_millis(pause), || {
            for round in 0..rounds {
                let image = image(2000 + round);
                let bytes = image.bytes();
                let digest = world.import_bytes(&bytes, "web:1");
                let by_name: PathBuf = world.mountpoint().join("templates/web/1/memory");
                let path = world.file(&digest, "memory");
                open_and_compare(&by_name, &bytes);
                let mut clone = Actor::start();
                clone.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
                // It is in use, and stays; then it is not, and goes.
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
