//! A supervisor that is killed takes nobody with it, and who comes after it finds what serves.

use std::fs;
use std::io::Write;

use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::host;
use crate::support::mount::{TestMount, temporary, wait_for};
use crate::support::passing::Mounted;
use crate::support::readers::Image;

#[test]
fn a_supervisor_that_dies_takes_nobody_with_it() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = Image { salt: 9, pages: 4 << 10 }.bytes();
    let digest = world.import_bytes(&bytes, "web:1");
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = ProcessId::of(supervisor).unwrap().unwrap();
    process.signal(Signal::KILL).unwrap();
    wait_for("its end", || (!process.is_alive()).then_some(()));
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    // The server is left alone; umount still knows what to do.
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    wait_for("the server's end", || world.processes().is_empty().then_some(()));
}

/// The record names the server that serves, soon after there is room for it again: by a dead one the mount would be taken
/// for dead with its supervisor.
#[test]
fn a_record_that_found_no_room_is_written_when_there_is_some() {
    let _host = host::shared();
    let disk = temporary("small-");
    mount("none", disk.path(), "tmpfs", MountFlags::empty(), Some(c"size=256k,mode=0700")).unwrap();
    let _disk = Mounted(disk.path().to_owned());
    let world = TestMount::unmounted();
    std::os::unix::fs::symlink(disk.path(), world.runtime_dir()).unwrap();
    world.mount(&["--serve", "decode"]).ok();
    let bytes = Image { salt: 10, pages: 4 << 10 }.bytes();
    let digest = world.import_bytes(&bytes, "web:1");
    let first = world.recorded_server().unwrap();

    let filler = disk.path().join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write(&[1; 4096]).is_ok() {}
    first.signal(Signal::KILL).unwrap();
    wait_for("a successor", || (world.server() != first.pid).then_some(()));
    assert_eq!(world.recorded_server(), Some(first), "there is no room for another record");
    drop(file);
    fs::remove_file(&filler).unwrap();
    let second = wait_for("the record", || world.recorded_server().filter(|its| *its != first));
    assert_eq!(second.pid, world.server());

    let supervisor = world.processes()[0];
    supervisor.signal(Signal::KILL).unwrap();
    assert!(supervisor.wait_gone(std::time::Duration::from_secs(10)).unwrap());
    world.mount(&["--serve", "decode"]).ok();
    assert_eq!(world.recorded_server(), Some(second), "the same server");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
}
