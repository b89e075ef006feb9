//! More callers than a server has slots for those who wait: the further ones are served otherwise or wait as well, and
//! nobody gets an error.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use stencilfs::control::PARKED_SLOTS;
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::inflight::table_of;
use crate::support::mount::{TestMount, wait_for};
use crate::support::passing::StoppedProcess;
use crate::support::readers::{Image, PAGE};

/// As many as there are slots, and some.
const CROWD: usize = PARKED_SLOTS + 200;

const IMAGE: Image = Image { salt: 15, pages: CROWD as u64 + 300 };

fn raise_limit() {
    let now = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now }).unwrap();
}

/// So many threads with little memory each.
fn crowd<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl Fn(usize) + Send + Clone + 'scope,
) {
    for number in 0..CROWD {
        let work = work.clone();
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        thread.spawn_scoped(scope, move || work(number)).unwrap();
    }
}

/// A supervisor that stands still makes no backing: first opens wait, as many as there are slots. In `auto` the others
/// are served by decode at once.
#[test]
fn opens_beyond_the_slots_are_served_by_decode() {
    let _host = host::alone();
    raise_limit();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "600", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let passthrough = fs::metadata(&path).unwrap().ino();
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let supervisor = ProcessId::of(supervisor).unwrap().unwrap();
    let table = table_of(world.server());
    let (decoded, waited) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let go_on = StoppedProcess::stop(supervisor);
        let (path, decoded, waited) = (&path, &decoded, &waited);
        crowd(scope, move |number| {
            let file = File::open(path).expect("every open is answered");
            let by = if file.metadata().unwrap().ino() == passthrough { waited } else { decoded };
            by.fetch_add(1, Ordering::Relaxed);
            let mut page = [0; PAGE as usize];
            file.read_exact_at(&mut page, number as u64 * PAGE).expect("every page is answered");
            assert!(page == IMAGE.page(number as u64), "page {number}");
        });
        wait_for("full slots", || (table.parked() == PARKED_SLOTS).then_some(()));
        wait_for("those beyond", || (decoded.load(Ordering::Relaxed) == CROWD - PARKED_SLOTS).then_some(()));
        assert_eq!(waited.load(Ordering::Relaxed), 0);
        drop(go_on);
    });
    assert_eq!(waited.load(Ordering::Relaxed), PARKED_SLOTS);
    assert!(
        world.log().contains("opens are waiting for backings: further opens do not wait"),
        "{}",
        world.log()
    );
    wait_for("an empty table", || (table.parked() == 0).then_some(()));
    assert_eq!((world.counter("failed"), world.status()["restarts"].as_u64()), (0, Some(0)));
}

/// Where nothing but passthrough is allowed they are told to come again.
#[test]
fn opens_beyond_the_slots_are_told_to_come_again_where_decode_is_none() {
    let _host = host::alone();
    raise_limit();
    let world = TestMount::with(&["--serve", "passthrough", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    fs::metadata(&path).unwrap();
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let supervisor = ProcessId::of(supervisor).unwrap().unwrap();
    let (refused, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
    supervisor.signal(Signal::STOP).unwrap();
    std::thread::scope(|scope| {
        let (path, refused, served) = (&path, &refused, &served);
        crowd(scope, move |_| match File::open(path) {
            Ok(_) => drop(served.fetch_add(1, Ordering::Relaxed)),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => drop(refused.fetch_add(1, Ordering::Relaxed)),
            Err(e) => panic!("{e}"),
        });
        let beyond = CROWD - PARKED_SLOTS;
        let done = wait_until(|| refused.load(Ordering::Relaxed) == beyond);
        let _ = supervisor.signal(Signal::CONT);
        assert!(done, "{} of {beyond} were refused", refused.load(Ordering::Relaxed));
    });
    assert_eq!(served.load(Ordering::Relaxed), PARKED_SLOTS, "who waited is served");
    assert!(fs::read(&path).unwrap() == IMAGE.bytes(), "and so is who comes again");
}

fn wait_until(done: impl Fn() -> bool) -> bool {
    for _ in 0..6000 {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// READs that wait for a store that is away: the kernel hands out only some at a time, and in the end all are answered.
#[test]
fn a_crowd_of_reads_waits_for_its_store() {
    let _host = host::alone();
    raise_limit();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    // Direct reads are one request each.
    let direct = libc::O_DIRECT;
    let file = File::options().read(true).custom_flags(direct).open(world.file(&digest, "memory")).unwrap();
    let table = table_of(world.server());
    let aside = world.store_dir().with_file_name("aside");
    fs::rename(world.store_dir(), &aside).unwrap();
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (file, answered) = (&file, &answered);
        crowd(scope, move |number| {
            #[repr(align(4096))]
            struct Aligned([u8; PAGE as usize]);
            let mut page = Box::new(Aligned([0; PAGE as usize]));
            file.read_exact_at(&mut page.0, number as u64 * PAGE).expect("every page is answered");
            assert!(page.0 == IMAGE.page(number as u64), "page {number}");
            answered.fetch_add(1, Ordering::Relaxed);
        });
        // More than there are threads to answer them.
        let full = wait_until(|| table.parked() >= 100);
        let early = answered.load(Ordering::Relaxed);
        fs::rename(&aside, world.store_dir()).unwrap();
        assert!(full && early == 0, "{} wait, {early} were answered", table.parked());
    });
    assert_eq!(answered.load(Ordering::Relaxed), CROWD);
    wait_for("an empty table", || (table.parked() == 0).then_some(()));
    assert_eq!((world.counter("failed"), world.counter("damaged")), (0, 0));
}
