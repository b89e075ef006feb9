//! Supervisors that are killed during the startup of their mount.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::failover::take_over::IMAGE;
use crate::support::host;
use crate::support::mount::{TestMount, daemon, wait_for};

/// Kills the supervisor at various moments in the first second of a mount; `stencil mount` always recovers the mount.
#[test]
fn soak_mounts_recover_from_supervisors_that_die_at_startup() {
    let _host = host::alone();
    let world = TestMount::unmounted();
    let digest = world.import_bytes(&IMAGE.bytes(), "web:1");
    let path = world.file(&digest, "memory");
    let mnt = world.mountpoint().to_str().unwrap();
    let mut adopted = 0;
    let rounds = host::rounds(12, 100);
    for round in 0..rounds {
        let mut mount = world.command();
        mount.args(["mount", mnt]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut mount = mount.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", mount.id());
        let child = || {
            let text = fs::read_to_string(&children).ok()?;
            let process = ProcessId::of(text.split_whitespace().next()?.parse().ok()?).ok()??;
            let program = fs::read_link(format!("/proc/{}/exe", process.pid)).ok()?;
            (program == daemon()).then_some(process)
        };
        // On a busy host `stencil mount` may have exited before its child is found.
        let find_child = || {
            let deadline = Instant::now() + Duration::from_millis(20);
            std::iter::repeat_with(child).take_while(|_| Instant::now() < deadline).find_map(|found| found)
        };
        let supervisor =
            wait_for("a supervisor", || find_child().or_else(|| world.processes().first().copied()));
        match round % 4 {
            // In every fourth round the supervisor has a server, however slow the host is.
            3 => drop(wait_for("a server", || world.recorded_server().filter(ProcessId::is_alive))),
            _ => std::thread::sleep(Duration::from_micros(round * 7919 % 24_000)),
        }
        supervisor.signal(Signal::KILL).unwrap();
        assert!(supervisor.wait_for_exit(Duration::from_secs(10)).unwrap());
        let before = world.recorded_server().filter(ProcessId::is_alive);
        world.mount(&[]).ok();
        // The first `stencil mount` may have waited for the next supervisor too.
        mount.wait().unwrap();
        assert!(fs::read(&path).unwrap() == IMAGE.bytes(), "round {round}");
        adopted += u64::from(before.is_some() && world.recorded_server() == before);
        let processes = world.processes();
        world.stencil(&["umount", mnt]).ok();
        wait_for("the exit of supervisor and server", || {
            processes.iter().all(|p| !p.is_alive()).then_some(())
        });
        let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounted.contains(mnt), "round {round}: a mount is left: {mounted}");
    }
    println!("{rounds} supervisors killed at startup; {adopted} times the running server was taken over");
    assert!(adopted > 0, "no supervisor was killed while its server ran");
}
