//! The clock of a guest that is resumed long after its capture: its RTC shows today's time, its system clock does where a
//! guest agent runs, and the command says what it is.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::support::guest::{Qemu, patiently, told};
use crate::support::host;
use crate::support::mount::TestMount;

/// How old the template is at least: more than any answer takes.
const AGE: Duration = Duration::from_secs(6);

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The RTC and the system clock of the guest behind that port, as seconds that they are behind the host.
fn behind(port: &Path) -> [i64; 2] {
    let answer = told(port, "clock");
    let words: Vec<&str> = answer.split(' ').collect();
    // As hwclock reads the same clock.
    let year = words.iter().find(|word| word.len() == 4 && word.parse::<u32>().is_ok());
    assert!(year.is_some(), "{answer}");
    [0, 1].map(|at| now() as i64 - words[at].parse::<i64>().unwrap())
}

/// Captures a guest, resumes a clone of it later, and gives what the command said and how far the clone's clocks are behind.
fn resumed(port: &str) -> (String, [i64; 2]) {
    let world = TestMount::new("decode");
    let dir = world.dir();
    let more = format!(
        "-rtc base=utc -serial unix:{0}/second.sock,server=on,wait=off -device virtio-serial-pci \
         -chardev socket,id=agent,path={0}/agent.sock,server=on,wait=off {port}",
        dir.display()
    );
    let guest = Qemu::boot_with(dir, &more);
    let second = dir.join("second.sock");
    patiently("a clock that was set at boot", Duration::from_secs(20), || {
        behind(&second).iter().all(|seconds| seconds.abs() <= 3).then_some(())
    });
    world.json(&["capture", guest.socket().to_str().unwrap(), "vm:1", "--quit"]);
    let captured = now();
    drop(guest);
    patiently("time", AGE * 2, || (now() >= captured + AGE.as_secs()).then_some(()));

    let launched = world.json(&["clone", "vm:1"]);
    let age = launched["template_age_seconds"].as_u64().unwrap();
    assert!((AGE.as_secs()..AGE.as_secs() + 60).contains(&age), "{age}");
    let folder = Path::new(launched["clones"][0]["dir"].as_str().unwrap());
    let clocks = behind(&folder.join("serial-1.sock"));
    world.stencil(&["stop", "--all"]).ok();
    let warnings = launched["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    (warnings[0].as_str().unwrap().to_owned(), clocks)
}

#[test]
fn the_rtc_of_a_clone_shows_the_time_of_today() {
    let _host = host::shared();
    let (said, [rtc, system]) = resumed("");
    assert!(rtc.abs() <= 3, "the RTC is {rtc} s behind: {said}");
    assert!(system >= AGE.as_secs() as i64 - 1, "only {system} s behind: {said}");
    assert!(
        said.contains("no channel for a guest agent") && said.contains("docs/how-to/renew-clones.md"),
        "{said}"
    );
}

#[test]
fn the_guest_agent_of_a_clone_sets_its_clock() {
    let _host = host::shared();
    let (said, [rtc, system]) = resumed("-device virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
    assert!(rtc.abs() <= 3 && system.abs() <= 3, "{rtc} and {system} s behind: {said}");
    assert!(said.contains("the guest agents have set the clocks"), "{said}");
}
