//! A supervisor that is killed takes nobody with it.

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::readers::Image;

#[test]
fn a_supervisor_that_dies_takes_nobody_with_it() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let bytes = Image { salt: 9, pages: 4 << 10 }.bytes();
    let digest = world.import_bytes(&bytes, "web:1");
    let supervisor = world.status()["supervisor_pid"].as_u64().unwrap() as u32;
    let process = stencilfs::sys::process::ProcessId::of(supervisor).unwrap().unwrap();
    process.signal(rustix::process::Signal::KILL).unwrap();
    crate::support::mount::wait_for("its end", || (!process.is_alive()).then_some(()));
    assert!(std::fs::read(world.file(&digest, "memory")).unwrap() == bytes);
    // The server is left alone; umount still knows what to do.
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    crate::support::mount::wait_for("the server's end", || world.processes().is_empty().then_some(()));
}
