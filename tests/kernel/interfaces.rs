//! Kernel interfaces that only root can use, without the processes of a mount.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use stencilfs::sys::files::mount;
use stencilfs::sys::fuse::{control_fs, device};
use stencilfs::sys::memory::mapping::{Mapping, Protection, Request, Sharing};
use stencilfs::sys::memory::pagemap::{Categories, DirtyRange, Pagemap, Query};
use stencilfs::sys::process::exit_status::ExitStatus;
use stencilfs::sys::process::{ProcessId, pidfd, procfs};
use stencilfs::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE};

use crate::support::daemon::userfault;
use crate::support::host;
use crate::support::mount::temporary;

#[test]
fn resolves_mountpoints_without_accessing_the_mount() {
    let _host = host::shared();
    let dir = temporary("kernel-");
    let real = std::fs::canonicalize(dir.path()).unwrap();
    let (mnt, link) = (real.join("mnt"), real.join("link"));
    std::fs::create_dir(&mnt).unwrap();
    std::os::unix::fs::symlink(&mnt, &link).unwrap();
    std::os::unix::fs::symlink(&real, real.join("again")).unwrap();
    // No server replies on this connection, so an access to the mount would never return.
    let fuse = device::open().unwrap();
    mount::mount_fuse(&fuse, &real, &mnt, false).unwrap();
    let places = [mnt.clone(), real.join("again/mnt"), real.join("mnt/")].map(|path| mount::place(&path));
    let mounted = mount::at(&mnt);
    mount::unmount(&mnt, true).unwrap();
    for place in places {
        assert_eq!(place.unwrap(), mnt);
    }
    assert_eq!(mounted.unwrap().unwrap().fs_type, mount::FS_TYPE);
    assert_eq!(mount::at(&mnt).unwrap(), None);
    assert_eq!(mount::place(&link).unwrap(), mnt, "a link to a mountpoint is followed");
    assert_eq!(mount::place(&real.join("again/missing")).unwrap(), real.join("missing"));
    assert!(mount::place(Path::new("/no/such/place")).is_err());
    assert_eq!(mount::place(Path::new("/")).unwrap(), Path::new("/"));
}

#[test]
fn abort_affects_only_its_own_connection() {
    let _host = host::shared();
    let dir = temporary("kernel-");
    let new_mount = || {
        let fuse = device::open().unwrap();
        mount::mount_fuse(&fuse, dir.path(), dir.path(), false).unwrap();
        let device = mount::at(dir.path()).unwrap().unwrap().dev;
        (fuse, device)
    };
    let mut reused = 0;
    for _ in 0..50 {
        let (fuse, device) = new_mount();
        let (early, late) = (mount::Abort::of(device).unwrap(), mount::Abort::of(device).unwrap());
        assert!(!device::is_over(&fuse));
        early.now().unwrap();
        let aborted = device::is_over(&fuse);
        mount::unmount(dir.path(), true).unwrap();
        drop(fuse);
        let (next, next_device) = new_mount();
        let done = late.now();
        let spared = !device::is_over(&next);
        mount::unmount(dir.path(), true).unwrap();
        assert!(
            aborted && done.is_ok() && spared,
            "{aborted} {done:?} {spared}, devices {device} and {next_device}"
        );
        reused += u32::from(next_device == device);
        if reused > 3 {
            return;
        }
    }
    assert!(reused > 0, "no device number was reused");
}

#[test]
fn aborting_a_missing_connection_is_enoent() {
    let _host = host::shared();
    let error = mount::abort_fuse_connection(rustix::fs::makedev(0, 999_999)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
}

#[test]
fn lists_connections_and_pending_requests() {
    let _host = host::shared();
    let dir = temporary("kernel-");
    let fuse = device::open().unwrap();
    mount::mount_fuse(&fuse, "stencil-test".as_ref(), dir.path(), false).unwrap();
    let device = procfs::mounts().unwrap().into_iter().rfind(|m| m.mountpoint == dir.path()).map(|m| m.dev);
    let listed = control_fs::connections();
    // The INIT request has not been read, so one request is pending.
    let number = rustix::fs::minor(device.unwrap());
    let waiting = control_fs::Waiting::of(device.unwrap()).and_then(|w| Ok((w.read()?, w.read()?)));
    mount::unmount(dir.path(), true).unwrap();
    assert!(listed.unwrap().contains(&control_fs::Connection { number, waiting: 1 }));
    assert_eq!(waiting.unwrap(), (1, 1), "the counter can be read repeatedly");
}

#[test]
fn new_connection_is_not_over_and_has_no_backing() {
    let _host = host::shared();
    let fuse = device::open().unwrap();
    assert!(!device::is_over(&fuse) || device::backing_close(&fuse, 1).is_err());
}

#[test]
fn the_connection_of_a_descriptor_is_that_of_its_mount() {
    let _host = host::shared();
    let dir = temporary("kernel-");
    let fuse = device::open().unwrap();
    mount::mount_fuse(&fuse, dir.path(), dir.path(), false).unwrap();
    let mounts = procfs::mounts().unwrap();
    let device = mounts.into_iter().rfind(|m| m.mountpoint == dir.path()).map(|m| m.dev);
    let held = device.map(|device| device::is_held_by(std::process::id(), device));
    // A device number that no mount of this process has.
    let other = device.map(|_| device::is_held_by(std::process::id(), rustix::fs::makedev(0, 0xf_ffff)));
    mount::unmount(dir.path(), true).unwrap();
    assert_eq!(device::connection_of(&fuse).unwrap(), device);
    assert_eq!((held, other), (Some(true), Some(false)));
}

#[test]
fn reads_the_status_of_zombies() {
    let _host = host::shared();
    for (script, status) in [
        ("exit 0", ExitStatus::Code(0)),
        ("exit 37", ExitStatus::Code(37)),
        ("kill -KILL $$", ExitStatus::Signal(9)),
    ] {
        let mut child = Command::new("sh")
            .args(["-c", &format!("read x; {script}")])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = ProcessId::of(child.id()).unwrap().unwrap();
        let fd = pidfd(child.id()).unwrap().unwrap();
        assert_eq!(ExitStatus::read(process, &fd), None, "alive: {script}");
        drop(child.stdin.take());
        rustix::process::waitid(
            rustix::process::WaitId::PidFd(fd.as_fd()),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert_eq!(ExitStatus::read(process, &fd), Some(status), "zombie: {script}");
        child.wait().unwrap();
    }
}

fn private_map(file: &File, length: u64, align: u64) -> Mapping {
    Mapping::new(&Request {
        length: Bytes::new(length),
        align: Bytes::new(align),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Private,
        reserve: false,
        sync: false,
    })
    .unwrap()
}

fn template(length: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let page: Vec<u8> = (0..PAGE_SIZE).map(|n| n as u8).collect();
    for _ in 0..length / PAGE_SIZE {
        file.write_all(&page).unwrap();
    }
    file
}

fn pages(map: &Mapping, found: &[DirtyRange]) -> Vec<u64> {
    let page = |address: u64| (address - map.range().start) / PAGE_SIZE;
    found.iter().flat_map(|r| page(r.range.start)..page(r.range.end)).collect()
}

/// Returns pseudo-random numbers, the same in every run.
fn scattered(count: u64, below: u64, seed: u64) -> BTreeSet<u64> {
    let mut state = seed;
    let mut set = BTreeSet::new();
    while (set.len() as u64) < count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        set.insert((state >> 33) % below);
    }
    set
}

fn write_page(map: &Mapping, page: u64) {
    map.store(MemoryOffset::new(page * PAGE_SIZE + page % PAGE_SIZE), 0xee).unwrap();
}

/// Installs guard pages: an access raises SIGSEGV.
#[allow(unsafe_code)]
fn install_guards(start: u64, length: u64) {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    // SAFETY: no reference points into the range.
    let done = unsafe { libc::madvise(start as *mut libc::c_void, length as usize, MADV_GUARD_INSTALL) };
    assert_eq!(done, 0);
}

#[test]
fn entries_report_frames_and_markers() {
    let _host = host::shared();
    let length = 64 * PAGE_SIZE;
    let file = template(length);
    let map = private_map(&file, length, PAGE_SIZE);
    map.load(MemoryOffset::new(0)).unwrap();
    write_page(&map, 5);
    install_guards(map.range().start + 8 * PAGE_SIZE, 8 * PAGE_SIZE);
    let entries = Pagemap::this_process().unwrap().entries(map.range()).unwrap();
    assert!(entries[5].frame().is_some() && entries[5].frame() != entries[0].frame());
    assert!(entries[8..16].iter().all(|e| e.is_guard() && e.is_marker()));
}

#[test]
fn write_protection_markers_are_not_dirty() {
    let _host = host::shared();
    let length = 16 << 20;
    let file = template(length);
    let map = private_map(&file, length, HUGE_PAGE_SIZE);
    let written = scattered(100, length / PAGE_SIZE, 5);
    written.iter().for_each(|page| write_page(&map, *page));
    let _armed = userfault::arm_write_protection(&map);
    let pagemap = Pagemap::this_process().unwrap();
    let swapped = Query { any: Categories::SWAPPED, ..Query::default() };
    let swapped_bytes: u64 =
        pagemap.scan(map.range(), &swapped).unwrap().iter().map(|r| r.range.end - r.range.start).sum();
    assert!(swapped_bytes > 100 * PAGE_SIZE, "the markers exist");
    assert_eq!(pages(&map, &pagemap.dirty(map.range()).unwrap()), Vec::from_iter(written.clone()));
    // A write to a protected page dirties one more page.
    let clean = (0..).find(|page| !written.contains(page)).unwrap();
    write_page(&map, clean);
    let found = pages(&map, &pagemap.dirty(map.range()).unwrap());
    assert_eq!(found.len(), 101);
    assert!(found.contains(&clean));
}
