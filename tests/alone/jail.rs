//! Forks that take all memory of the host.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::jail::{PAGE, fio, hash, import_from_fio};
use crate::support::actor::Actor;
use crate::support::guest::patiently;
use crate::support::host;
use crate::support::mount::TestMount;

/// stress-ng's forks take all free memory, and fio gives up the pages of templates and asks for them again.
#[test]
fn soak_forks_that_take_all_memory_leave_every_byte_right() {
    let _host = host::alone();
    let worlds = ["passthrough", "decode"].map(TestMount::new);
    let files = worlds.each_ref().map(import_from_fio);
    let mut clones = [0, 1].map(|_| Actor::start());
    for (clone, (bytes, file)) in clones.iter_mut().zip(&files) {
        clone.tell(&format!("map 0 {} 0 {} rw", file.display(), bytes.len()));
        for page in (0..bytes.len() / PAGE).step_by(5) {
            clone.tell(&format!("fill 0 {page} {}", page % 251));
        }
    }
    let seconds = host::rounds("4", "30");
    let stress =
        ["--mmapfork", "1", "--timeout", seconds, "--verify", "--temp-path", "/tmp", "--metrics-brief"];
    let mut stress = Command::new("stress-ng")
        .args(stress)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("stress-ng runs: make setup");
    let mut read = 0;
    let status = patiently("the end of stress-ng", Duration::from_secs(120), || {
        let before = worlds[1].counter("reads");
        for (_, file) in &files {
            // Through the page cache, which is empty of the file when it begins.
            fio(file, &["--ioengine=psync", "--invalidate=1"]);
        }
        // A READ brings a MiB at most: whatever stayed in the cache is not asked for.
        let asked = worlds[1].counter("reads") - before;
        assert!(asked >= 32, "{asked} READs for 32 MiB at time {read}: pages were not given up");
        read += 1;
        stress.try_wait().unwrap()
    });
    let stress = stress.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[stress.stdout, stress.stderr].concat()).into_owned();
    assert!(
        status.success() && said.contains("successful run completed") && !said.contains("fail:"),
        "{said}"
    );
    println!("32 MiB were read {read} times meanwhile");
    for ((clone, (bytes, file)), world) in clones.iter_mut().zip(&files).zip(&worlds) {
        for page in 0..bytes.len() / PAGE {
            let expected = match page % 5 {
                0 => hash(&[(page % 251) as u8; PAGE]),
                _ => hash(&bytes[page * PAGE..(page + 1) * PAGE]),
            };
            assert_eq!(clone.tell(&format!("hash 0 {page}")), expected, "page {page}");
        }
        assert!(fs::read(file).unwrap() == *bytes);
        assert_eq!(world.counter("damaged") + world.counter("failed"), 0);
    }
}
