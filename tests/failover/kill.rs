//! SIGKILL of a supervisor: its server continues to serve, and the next supervisor takes that server over.

use std::fs;
use std::io::Write;

use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::daemon::passing::Mounted;
use crate::support::daemon::readers::Image;
use crate::support::host;
use crate::support::mount::{TestMount, temporary, wait_for};

#[test]
fn the_server_continues_after_its_supervisor_dies() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = Image { salt: 9, pages: 4 << 10 }.bytes();
    let digest = world.import_bytes(&bytes, "web:1");
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = ProcessId::of(supervisor).unwrap().unwrap();
    process.signal(Signal::KILL).unwrap();
    wait_for("the supervisor to exit", || (!process.is_alive()).then_some(()));
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    // umount must work without the supervisor.
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    wait_for("the server to exit", || world.processes().is_empty().then_some(()));
}

/// Once the runtime directory has space again, the record is updated with the server that serves. A record that names a
/// dead server would make the whole mount look dead after the supervisor has died.
#[test]
fn a_record_that_hit_enospc_is_written_once_there_is_space() {
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
    wait_for("another server", || (world.server() != first.pid).then_some(()));
    assert_eq!(world.recorded_server(), Some(first), "there must be no space for the new record");
    drop(file);
    fs::remove_file(&filler).unwrap();
    let second = wait_for("the new record", || world.recorded_server().filter(|server| *server != first));
    assert_eq!(second.pid, world.server());

    let supervisor = world.processes()[0];
    supervisor.signal(Signal::KILL).unwrap();
    assert!(supervisor.wait_for_exit(std::time::Duration::from_secs(10)).unwrap());
    world.mount(&["--serve", "decode"]).ok();
    assert_eq!(world.recorded_server(), Some(second), "the next supervisor must keep the server");
    assert!(fs::read(world.file(&digest, "memory")).unwrap() == bytes);
}
