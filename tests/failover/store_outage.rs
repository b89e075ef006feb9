//! Store outages: reads that need the store wait, other reads continue, and no data is lost.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use stencilfs::control::{InFlightTable, Phase};
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::daemon::inflight::table_of;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const CLONES: u64 = 24;
/// More READs than a server has threads. Several clones may wait for one READ of the same pages.
const WAITING: usize = 17;

fn image(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Keeps the store unreachable until drop.
struct Outage<'a>(Box<dyn Fn() + 'a>);

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn moved(store: &Path) -> Outage<'_> {
    let aside = store.with_file_name("aside");
    fs::rename(store, &aside).unwrap();
    Outage(Box::new(move || fs::rename(&aside, store).unwrap()))
}

fn unreadable(store: &Path) -> Outage<'_> {
    let before = fs::metadata(store).unwrap().permissions();
    fs::set_permissions(store, Permissions::from_mode(0o000)).unwrap();
    Outage(Box::new(move || fs::set_permissions(store, before.clone()).unwrap()))
}

/// Mounts an empty file system over the store, as if the store's file system had been unmounted.
fn covered(store: &Path) -> Outage<'_> {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", store, "tmpfs", flags, None).unwrap();
    Outage(Box::new(move || rustix::mount::unmount(store, rustix::mount::UnmountFlags::DETACH).unwrap()))
}

fn waiting(table: &InFlightTable) -> usize {
    table.requests().filter(|r| r.phase == Phase::WaitingForStore).count()
}

fn errno(path: &Path) -> Option<i32> {
    fs::symlink_metadata(path).err().and_then(|e| e.raw_os_error())
}

/// Serves two templates, of which one has its pack open, and makes the store unreachable.
fn outage_is_survived(start_outage: fn(&Path) -> Outage<'_>, why: &str, kill: bool) {
    let _host = host::shared();
    // Each fault is a separate READ, so that many READs wait.
    let world = TestMount::with(&["--serve", "decode", "--read-ahead", "128K"]);
    let store = world.store_dir();
    let images = [image(1), image(2)];
    let digests = [world.import_bytes(&images[0], "open:1"), world.import_bytes(&images[1], "closed:1")];
    let files = digests.each_ref().map(|d| File::open(world.file(d, "memory")).unwrap());
    let mut page = [0; PAGE as usize];
    files[0].read_exact_at(&mut page, 0).unwrap();
    rustix::fs::fadvise(&files[0], 0, None, rustix::fs::Advice::Random).unwrap();
    let clones: Vec<Actor> = (0..CLONES)
        .map(|_| {
            let mut clone = Actor::start();
            let path = world.file(&digests[1], "memory");
            clone.tell(&format!("map 0 {} 0 {} rw", path.display(), PAGES * PAGE));
            clone
        })
        .collect();
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    let table = table_of(server.pid);
    let duration = if host::soaking() { Duration::from_secs(10) } else { Duration::from_secs(2) };
    let begun = Instant::now();
    let outage = start_outage(&store);
    std::thread::scope(|scope| {
        let readers: Vec<_> = clones
            .into_iter()
            .enumerate()
            .map(|(i, mut clone)| {
                let bytes = &images[1];
                scope.spawn(move || {
                    for number in [i as u64 * 40, 1000 - i as u64] {
                        let got = clone.tell(&format!("read 0 {number}")) as u8;
                        assert_eq!(got, bytes[(number * PAGE) as usize], "page {number}");
                    }
                    Instant::now()
                })
            })
            .collect();
        wait_for("all clones to wait", || (waiting(&table) >= WAITING).then_some(()));
        wait_for("a sign of life of the waiting server", || {
            (table.longest_in_phase().unwrap().still < Duration::from_secs(1)).then_some(())
        });
        if !kill {
            // More reads wait than the server has threads; they do not block reads from an open pack.
            let mut attempt = 0;
            host::measured(|| {
                for number in (1..20).map(|number| number * 50 + attempt * 17) {
                    let asked = Instant::now();
                    files[0].read_exact_at(&mut page, number * PAGE).unwrap();
                    let passed = asked.elapsed();
                    assert!(page == images[0][(number * PAGE) as usize..][..PAGE as usize], "page {number}");
                    if passed >= Duration::from_secs(1) {
                        attempt += 1;
                        return Err(format!("{passed:?} for page {number}, which does not need the store"));
                    }
                }
                Ok(())
            });
            for name in ["open", "closed", "never"] {
                assert_eq!(
                    errno(&world.mountpoint().join("templates").join(name)),
                    Some(libc::EIO),
                    "{name}"
                );
            }
            assert_eq!(
                fs::read_dir(world.mountpoint().join("by-id"))
                    .unwrap()
                    .next()
                    .unwrap()
                    .unwrap_err()
                    .raw_os_error(),
                Some(libc::EIO)
            );
            std::thread::sleep(duration.saturating_sub(begun.elapsed()));
            assert!(waiting(&table) >= WAITING, "reads stopped waiting during the outage");
        } else {
            server.signal(rustix::process::Signal::KILL).unwrap();
            std::thread::sleep(duration.saturating_sub(begun.elapsed()));
        }
        drop(outage);
        let back = Instant::now();
        for reader in readers {
            let done = reader.join().expect("a clone got SIGBUS or a wrong byte");
            assert!(
                done > back && done - back < Duration::from_secs(12),
                "a read took {:?} after the end of the outage",
                done - back
            );
        }
    });
    let names = fs::read_dir(world.mountpoint().join("templates")).unwrap();
    assert_eq!(names.count(), 2, "a name was cached as missing");
    for (digest, bytes) in digests.iter().zip(&images) {
        assert!(fs::read(world.file(digest, "memory")).unwrap() == *bytes);
    }
    assert_eq!(errno(&world.mountpoint().join("templates/never")), Some(libc::ENOENT));
    let status = world.status();
    let counter = |name: &str| status["counters"][name].as_u64().unwrap();
    assert_eq!(counter("damaged"), 0, "{status:#}");
    assert!(counter("source_waits") >= WAITING as u64, "{status:#}");
    let log = world.log();
    let lines = |words: &str| log.lines().filter(|l| l.contains(words)).count();
    assert!(!log.contains("is missing"), "the outage was reported as damage:\n{log}");
    assert!(log.contains(&format!("store/format: {why}")), "{log}");
    if !kill {
        assert_eq!(lines("cannot reach the store: "), 1, "{log}");
        assert_eq!(lines("the store can be reached again"), 1, "{log}");
        assert_eq!(status["restarts"], 0);
    }
}

#[test]
fn soak_clones_survive_a_store_that_is_moved_away_and_back() {
    outage_is_survived(moved, "No such file or directory", false);
}

#[test]
fn soak_clones_survive_a_store_that_is_temporarily_unreadable() {
    outage_is_survived(unreadable, "Permission denied", false);
}

#[test]
fn soak_clones_survive_a_store_whose_file_system_is_unmounted() {
    outage_is_survived(covered, "No such file or directory", false);
}

#[test]
fn clones_survive_a_server_killed_during_a_store_outage() {
    outage_is_survived(moved, "No such file or directory", true);
}

/// A second mount of the scenario; unmounted on drop.
struct Second<'a>(&'a TestMount, &'a Path);

impl Drop for Second<'_> {
    fn drop(&mut self) {
        let run = self.0.stencil(&["umount", "--force", self.1.to_str().unwrap()]);
        assert!(run.code == 0 || std::thread::panicking(), "{}", run.err);
    }
}

/// `status` still lists a mount whose store is unreachable, alone and beside other mounts.
#[test]
fn status_reports_a_mount_during_a_store_outage() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&image(1), "web:1");
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), PAGES * PAGE));
    let other = world.dir().join("other");
    let second = world.dir().join("second");
    fs::create_dir(&second).unwrap();
    let (place, mountpoint) = (other.to_str().unwrap(), second.to_str().unwrap());
    stencilfs::store::Store::open_or_create(&other).unwrap();
    world.stencil(&["--store", place, "mount", mountpoint, "--serve", "decode"]).ok();
    let _second = Second(&world, &second);
    let store_error = |is_away: bool| {
        let answer = world.status_of_all();
        let of = |at: &Path| {
            let mounts = answer["mounts"].as_array().unwrap();
            mounts.iter().find(|m| m["mountpoint"] == at.to_str().unwrap()).unwrap().clone()
        };
        let (ours, others) = (of(world.mountpoint()), of(&second));
        assert_eq!(ours["store_error"].is_string(), is_away, "{answer:#}");
        assert!(others.get("store_error").is_none(), "{answer:#}");
        assert!(ours["server_pid"].is_u64() && ours["counters"].is_object(), "{answer:#}");
        for template in ours["templates"].as_array().unwrap() {
            let clones = if is_away { serde_json::Value::Null } else { 1.into() };
            assert_eq!(template["clones"], clones, "{answer:#}");
        }
        ours["store_error"].as_str().unwrap_or_default().to_owned()
    };
    store_error(false);
    let store = world.store_dir();
    let why = "no template store found";
    for start_outage in [moved as fn(&Path) -> Outage<'_>, covered] {
        let outage = start_outage(&store);
        assert!(store_error(true).contains(why));
        let text = world.stencil(&["status"]).ok().out;
        assert!(text.contains(why) && text.contains("the clones of the mount are unknown"), "{text}");
        drop(outage);
        store_error(false);
    }
    // Another store at the same path is not accepted.
    let aside = moved(&store);
    stencilfs::store::Store::open_or_create(&store).unwrap();
    assert!(store_error(true).contains("another store"));
    fs::remove_dir_all(&store).unwrap();
    drop(aside);
    store_error(false);
}

/// A read waits at most 30 s for the store, then fails with EIO, whether it began before or during the outage; after
/// the outage reads work again.
#[test]
fn soak_reads_fail_with_eio_after_30_s_of_store_outage() {
    const WAIT: Duration = Duration::from_secs(30);
    if !host::soaking() {
        return println!("the wait of 30 s runs in `make soak` only");
    }
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = image(3);
    let digest = world.import_bytes(&bytes, "web:1");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    let store = world.store_dir();
    let outage = moved(&store);
    std::thread::scope(|scope| {
        let reads: Vec<_> = (0..WAITING as u64)
            .map(|number| {
                let file = &file;
                scope.spawn(move || {
                    let begun = Instant::now();
                    let error = file.read_exact_at(&mut [0; PAGE as usize], number * 20 * PAGE).unwrap_err();
                    (error.raw_os_error(), begun.elapsed())
                })
            })
            .collect();
        for read in reads {
            let (errno, waited) = read.join().unwrap();
            assert_eq!(errno, Some(libc::EIO));
            // A buffered read sends two requests: for readahead, then for its page.
            assert!(waited >= WAIT && waited < WAIT * 3, "{waited:?}");
        }
    });
    let log = world.log();
    assert_eq!(
        log.lines().filter(|l| l.contains("failed with EIO: the store was away for 30s")).count(),
        1,
        "{log}"
    );
    drop(outage);
    // `stencil status` needs the store too.
    assert!(world.counter("failed") >= WAITING as u64);
    assert_eq!((world.counter("damaged"), world.status()["restarts"].as_u64()), (0, Some(0)));
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes, "a failure was cached");
    wait_for("the end of the outage", || {
        world.log().contains("the store can be reached again").then_some(())
    });
}
