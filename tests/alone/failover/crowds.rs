//! More concurrent callers than the server has slots for pending requests.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use stencilfs::control::PARKED_SLOTS;
use stencilfs::sys::process::ProcessId;

use crate::support::daemon::inflight::table_of;
use crate::support::daemon::passing::StoppedProcess;
use crate::support::daemon::readers::{Image, PAGE};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// Number of callers: more than the slots for pending requests.
const CALLERS: usize = PARKED_SLOTS + 200;

const IMAGE: Image = Image { salt: 15, pages: CALLERS as u64 + 300 };

fn raise_fd_limit() {
    let now = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now }).unwrap();
}

/// Starts `CALLERS` threads with small stacks. Each calls `work` with its number.
fn spawn_callers<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl Fn(usize) + Send + Clone + 'scope,
) {
    for number in 0..CALLERS {
        let work = work.clone();
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        thread.spawn_scoped(scope, move || work(number)).unwrap();
    }
}

/// A stopped supervisor creates no backing: as many first opens as there are slots wait. With `--serve auto`, further
/// opens are served by decode at once.
#[test]
fn opens_beyond_the_slot_limit_are_served_by_decode() {
    let _host = host::alone();
    raise_fd_limit();
    let world = TestMount::with(&["--serve", "auto", "--hydrate-timeout", "600", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let passthrough_ino = fs::metadata(&path).unwrap().ino();
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let supervisor = ProcessId::of(supervisor).unwrap().unwrap();
    let table = table_of(world.server());
    let (decoded, waited) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let resume_on_drop = StoppedProcess::stop(supervisor);
        let (path, decoded, waited) = (&path, &decoded, &waited);
        spawn_callers(scope, move |number| {
            let file = File::open(path).expect("the open succeeds");
            let counter = if file.metadata().unwrap().ino() == passthrough_ino { waited } else { decoded };
            counter.fetch_add(1, Ordering::Relaxed);
            let mut page = [0; PAGE as usize];
            file.read_exact_at(&mut page, number as u64 * PAGE).expect("the read succeeds");
            assert!(page == IMAGE.page(number as u64), "page {number}");
        });
        wait_for("the use of all slots", || (table.parked() == PARKED_SLOTS).then_some(()));
        wait_for("the opens beyond the limit", || {
            (decoded.load(Ordering::Relaxed) == CALLERS - PARKED_SLOTS).then_some(())
        });
        assert_eq!(waited.load(Ordering::Relaxed), 0);
        drop(resume_on_drop);
    });
    assert_eq!(waited.load(Ordering::Relaxed), PARKED_SLOTS);
    assert!(
        world.log().contains(
            "opens are waiting for backings: further opens are served by decode or fail with EAGAIN"
        ),
        "{}",
        world.log()
    );
    wait_for("the end of all pending requests", || (table.parked() == 0).then_some(()));
    assert_eq!((world.counter("failed"), world.status()["restarts"].as_u64()), (0, Some(0)));
}

/// With `--serve passthrough`, opens beyond the slots fail with EAGAIN; the waiting opens succeed once the supervisor
/// runs.
#[test]
fn opens_beyond_the_slot_limit_get_eagain_without_decode() {
    let _host = host::alone();
    raise_fd_limit();
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
        spawn_callers(scope, move |_| match File::open(path) {
            Ok(_) => drop(served.fetch_add(1, Ordering::Relaxed)),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => drop(refused.fetch_add(1, Ordering::Relaxed)),
            Err(e) => panic!("{e}"),
        });
        let beyond = CALLERS - PARKED_SLOTS;
        let done = wait_until(|| refused.load(Ordering::Relaxed) == beyond);
        let _ = supervisor.signal(Signal::CONT);
        assert!(done, "{} of {beyond} opens failed with EAGAIN", refused.load(Ordering::Relaxed));
    });
    assert_eq!(served.load(Ordering::Relaxed), PARKED_SLOTS, "every waiting open succeeds");
    assert!(fs::read(&path).unwrap() == IMAGE.bytes(), "an open after EAGAIN succeeds");
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

/// READs wait during a store outage. The kernel sends only some of them to the server at a time; all are answered in
/// the end.
#[test]
fn thousands_of_reads_wait_out_a_store_outage() {
    let _host = host::alone();
    raise_fd_limit();
    let world = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    // Each direct read is one READ request.
    let direct = libc::O_DIRECT;
    let file = File::options().read(true).custom_flags(direct).open(world.file(&digest, "memory")).unwrap();
    let table = table_of(world.server());
    let moved_store = world.store_dir().with_file_name("moved");
    fs::rename(world.store_dir(), &moved_store).unwrap();
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (file, answered) = (&file, &answered);
        spawn_callers(scope, move |number| {
            #[repr(align(4096))]
            struct Aligned([u8; PAGE as usize]);
            let mut page = Box::new(Aligned([0; PAGE as usize]));
            file.read_exact_at(&mut page.0, number as u64 * PAGE).expect("the read succeeds");
            assert!(page.0 == IMAGE.page(number as u64), "page {number}");
            answered.fetch_add(1, Ordering::Relaxed);
        });
        // More pending READs than the server has threads.
        let enough = wait_until(|| table.parked() >= 100);
        let answered_early = answered.load(Ordering::Relaxed);
        fs::rename(&moved_store, world.store_dir()).unwrap();
        assert!(
            enough && answered_early == 0,
            "{} READs wait, {answered_early} were answered during the outage",
            table.parked()
        );
    });
    assert_eq!(answered.load(Ordering::Relaxed), CALLERS);
    wait_for("the end of all pending requests", || (table.parked() == 0).then_some(()));
    assert_eq!((world.counter("failed"), world.counter("damaged")), (0, 0));
}
