//! The clocks of a guest that is resumed after its capture: the RTC shows the current time. The system clock shows the
//! current time only if a guest agent runs. `stencil clone` reports the state of the clocks.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::{Qemu, patiently, told};

/// Minimum age of the template: longer than any reply takes.
const MIN_AGE: Duration = Duration::from_secs(6);

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Returns how many seconds the RTC and the system clock of a guest are behind the clock of the host. The guest answers
/// on this serial port.
fn clock_lag(port: &Path) -> [i64; 2] {
    let reply = told(port, "clock");
    let fields: Vec<&str> = reply.split(' ').collect();
    // The reply ends with the output of hwclock, which has a year if hwclock could read the RTC.
    let year = fields.iter().find(|field| field.len() == 4 && field.parse::<u32>().is_ok());
    assert!(year.is_some(), "{reply}");
    [0, 1].map(|at| now() as i64 - fields[at].parse::<i64>().unwrap())
}

/// Captures a guest and resumes a clone of it later. Returns the warning of `stencil clone`, and the lag of the RTC and
/// the system clock of the clone in seconds.
fn resume_later(port: &str) -> (String, [i64; 2]) {
    let world = TestMount::new("decode");
    let dir = world.dir();
    let extra = format!(
        "-rtc base=utc -serial unix:{0}/second.sock,server=on,wait=off -device virtio-serial-pci \
         -chardev socket,id=agent,path={0}/agent.sock,server=on,wait=off {port}",
        dir.display()
    );
    let guest = Qemu::boot_with(dir, &extra);
    let second = dir.join("second.sock");
    patiently("clocks that were set at boot", Duration::from_secs(20), || {
        clock_lag(&second).iter().all(|seconds| seconds.abs() <= 3).then_some(())
    });
    world.json(&["capture", guest.socket().to_str().unwrap(), "vm:1", "--quit"]);
    let captured = now();
    drop(guest);
    patiently("the minimum age", MIN_AGE * 2, || (now() >= captured + MIN_AGE.as_secs()).then_some(()));

    let launched = world.json(&["clone", "vm:1"]);
    let age = launched["template_age_seconds"].as_u64().unwrap();
    assert!((MIN_AGE.as_secs()..MIN_AGE.as_secs() + 60).contains(&age), "{age}");
    let clone_dir = Path::new(launched["clones"][0]["dir"].as_str().unwrap());
    let clocks = clock_lag(&clone_dir.join("serial-1.sock"));
    world.stencil(&["stop", "--all"]).ok();
    let warnings = launched["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    (warnings[0].as_str().unwrap().to_owned(), clocks)
}

#[test]
fn the_rtc_of_a_clone_shows_the_current_time() {
    let _host = host::shared();
    let (warning, [rtc, system]) = resume_later("");
    assert!(rtc.abs() <= 3, "the RTC lags by {rtc} s: {warning}");
    assert!(system >= MIN_AGE.as_secs() as i64 - 1, "the system clock lags by only {system} s: {warning}");
    assert!(
        warning.contains("no channel for a guest agent") && warning.contains("docs/how-to/renew-clones.md"),
        "{warning}"
    );
}

#[test]
fn the_guest_agent_sets_the_system_clock_of_a_clone() {
    let _host = host::shared();
    let (warning, [rtc, system]) =
        resume_later("-device virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
    assert!(
        rtc.abs() <= 3 && system.abs() <= 3,
        "the RTC lags by {rtc} s, the system clock by {system} s: {warning}"
    );
    assert!(warning.contains("the guest agents have set the clocks"), "{warning}");
}
