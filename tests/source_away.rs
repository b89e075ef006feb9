//! A store that cannot be reached for a while: who needs a page from it waits, who needs none goes on, nothing is lost.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use stencilfs::control::{InFlightTable, Phase};
use stencilfs::sys::process::ProcessId;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::inflight::table_of;
use crate::support::mount::{TestMount, wait_for};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const CLONES: u64 = 24;
/// More READs than a server has threads. Clones whose pages come by one READ wait for it together.
const WAITING: usize = 17;

fn image(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Makes the store unreachable until it is dropped.
struct Away<'a>(Box<dyn Fn() + 'a>);

impl Drop for Away<'_> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn moved(store: &Path) -> Away<'_> {
    let aside = store.with_file_name("aside");
    fs::rename(store, &aside).unwrap();
    Away(Box::new(move || fs::rename(&aside, store).unwrap()))
}

fn unreadable(store: &Path) -> Away<'_> {
    let before = fs::metadata(store).unwrap().permissions();
    fs::set_permissions(store, Permissions::from_mode(0o000)).unwrap();
    Away(Box::new(move || fs::set_permissions(store, before.clone()).unwrap()))
}

/// An empty filesystem lies over it, as when what was mounted there is gone.
fn covered(store: &Path) -> Away<'_> {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", store, "tmpfs", flags, None).unwrap();
    Away(Box::new(move || rustix::mount::unmount(store, rustix::mount::UnmountFlags::DETACH).unwrap()))
}

fn waiting(table: &InFlightTable) -> usize {
    table.requests().filter(|r| r.phase == Phase::WaitingForSource).count()
}

fn errno(path: &Path) -> Option<i32> {
    fs::symlink_metadata(path).err().and_then(|e| e.raw_os_error())
}

/// Two templates are served, the pack of one is open, that of the other is not, when the store goes away.
fn goes_away(take_away: fn(&Path) -> Away<'_>, why: &str, kill: bool) {
    let _host = host::shared();
    let world = TestMount::new("decode");
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
    let away_for = if host::soaking() { Duration::from_secs(10) } else { Duration::from_secs(2) };
    let begun = Instant::now();
    let away = take_away(&store);
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
        wait_for("a sign of life: a server that waits is no stuck one", || {
            (table.stillest().unwrap().still < Duration::from_secs(1)).then_some(())
        });
        if !kill {
            // As many wait as there are threads, and more: they hold up nobody whose pack is open.
            let mut attempt = 0;
            host::measured(|| {
                for number in (1..20).map(|number| number * 50 + attempt * 17) {
                    let asked = Instant::now();
                    files[0].read_exact_at(&mut page, number * PAGE).unwrap();
                    let passed = asked.elapsed();
                    assert!(page == images[0][(number * PAGE) as usize..][..PAGE as usize], "page {number}");
                    if passed >= Duration::from_secs(1) {
                        attempt += 1;
                        return Err(format!("{passed:?} for page {number}, which needs no store"));
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
            std::thread::sleep(away_for.saturating_sub(begun.elapsed()));
            assert!(waiting(&table) >= WAITING, "they still wait");
        } else {
            server.signal(rustix::process::Signal::KILL).unwrap();
            std::thread::sleep(away_for.saturating_sub(begun.elapsed()));
        }
        drop(away);
        let back = Instant::now();
        for reader in readers {
            let done = reader.join().expect("no SIGBUS and no wrong byte");
            assert!(
                done > back && done - back < Duration::from_secs(12),
                "{:?} after it is back",
                done - back
            );
        }
    });
    let names = fs::read_dir(world.mountpoint().join("templates")).unwrap();
    assert_eq!(names.count(), 2, "nothing was remembered as missing");
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
    assert!(!log.contains("it is missing"), "a store that is away is not damaged:\n{log}");
    assert!(log.contains(&format!("store/format: {why}")), "{log}");
    if !kill {
        assert_eq!(lines("the store cannot be reached: "), 1, "{log}");
        assert_eq!(lines("the store can be reached again"), 1, "{log}");
        assert_eq!(status["restarts"], 0);
    }
}

#[test]
fn soak_a_store_that_is_moved_away_and_back_costs_nobody_a_page() {
    goes_away(moved, "No such file or directory", false);
}

#[test]
fn soak_a_store_that_is_unreadable_for_a_while_costs_nobody_a_page() {
    goes_away(unreadable, "Permission denied", false);
}

#[test]
fn soak_a_store_whose_filesystem_is_gone_for_a_while_costs_nobody_a_page() {
    goes_away(covered, "No such file or directory", false);
}

#[test]
fn a_server_that_is_killed_while_the_store_is_away_costs_nobody_a_page() {
    goes_away(moved, "No such file or directory", true);
}

/// Another mount of the scenario; unmounted when dropped.
struct Second<'a>(&'a TestMount, &'a Path);

impl Drop for Second<'_> {
    fn drop(&mut self) {
        let run = self.0.stencil(&["umount", "--force", self.1.to_str().unwrap()]);
        assert!(run.code == 0 || std::thread::panicking(), "{}", run.err);
    }
}

/// A mount whose store is away is told like others, and beside others.
#[test]
fn a_mount_is_told_while_its_store_is_away() {
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
    let told = |away: bool| {
        let answer = world.status_of_all();
        let of = |at: &Path| {
            let mounts = answer["mounts"].as_array().unwrap();
            mounts.iter().find(|m| m["mountpoint"] == at.to_str().unwrap()).unwrap().clone()
        };
        let (ours, others) = (of(world.mountpoint()), of(&second));
        assert_eq!(ours["store_error"].is_string(), away, "{answer:#}");
        assert!(others.get("store_error").is_none(), "{answer:#}");
        assert!(ours["server_pid"].is_u64() && ours["counters"].is_object(), "{answer:#}");
        for template in ours["templates"].as_array().unwrap() {
            let clones = if away { serde_json::Value::Null } else { 1.into() };
            assert_eq!(template["clones"], clones, "{answer:#}");
        }
        ours["store_error"].as_str().unwrap_or_default().to_owned()
    };
    told(false);
    let store = world.store_dir();
    let why = "no template store here";
    for take_away in [moved as fn(&Path) -> Away<'_>, covered] {
        let away = take_away(&store);
        assert!(told(true).contains(why));
        let text = world.stencil(&["status"]).ok().out;
        assert!(text.contains(why) && text.contains("is not known"), "{text}");
        drop(away);
        told(false);
    }
    // Another store in its place is not its store.
    let aside = moved(&store);
    stencilfs::store::Store::open_or_create(&store).unwrap();
    assert!(told(true).contains("another store"));
    fs::remove_dir_all(&store).unwrap();
    drop(aside);
    told(false);
}

/// The wait has an end: half a minute, then it is an error, for those who wait and for those who come; and then the store
/// is back.
#[test]
fn soak_a_store_that_does_not_come_back_is_an_error_after_half_a_minute() {
    const WAIT: Duration = Duration::from_secs(30);
    if !host::soaking() {
        return println!("half a minute is waited for in `make soak` only");
    }
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = image(3);
    let digest = world.import_bytes(&bytes, "web:1");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    let store = world.store_dir();
    let away = moved(&store);
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
            // A buffered read asks twice: for what lies ahead, then for its page.
            assert!(waited >= WAIT && waited < WAIT * 3, "{waited:?}");
        }
    });
    let log = world.log();
    assert_eq!(
        log.lines().filter(|l| l.contains("failed with EIO: the store was away for 30s")).count(),
        1,
        "{log}"
    );
    drop(away);
    // `stencil status` asks the store too.
    assert!(world.counter("failed") >= WAITING as u64);
    assert_eq!((world.counter("damaged"), world.status()["restarts"].as_u64()), (0, Some(0)));
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes, "nothing was remembered");
    wait_for("the end of the outage", || {
        world.log().contains("the store can be reached again").then_some(())
    });
}
