//! Templates under memory pressure: forks use all memory of the host.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::clones::jail::{PAGE, fio, hash, import_from_fio};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::patiently;

/// stress-ng uses all free memory by forking, while fio drops the pages of templates from the page cache and reads them
/// again.
#[test]
fn soak_template_data_stays_correct_under_memory_pressure() {
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
    let seconds = host::rounds("4", "15");
    let stress =
        ["--mmapfork", "1", "--timeout", seconds, "--verify", "--temp-path", "/tmp", "--metrics-brief"];
    let mut stress = Command::new("stress-ng")
        .args(stress)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("stress-ng runs: make setup");
    let mut rounds = 0;
    let status = patiently("the exit of stress-ng", Duration::from_secs(120), || {
        let before = worlds[1].counter("reads");
        for (_, file) in &files {
            // Reads through the page cache, from which fio drops the file first.
            fio(file, &["--ioengine=psync", "--invalidate=1"]);
        }
        // A READ has at most 1 MiB: fewer than 32 READs mean that pages were still cached.
        let reads = worlds[1].counter("reads") - before;
        assert!(reads >= 32, "{reads} READs for 32 MiB in round {rounds}: pages were not dropped");
        rounds += 1;
        stress.try_wait().unwrap()
    });
    let stress = stress.wait_with_output().unwrap();
    let output = String::from_utf8_lossy(&[stress.stdout, stress.stderr].concat()).into_owned();
    assert!(
        status.success() && output.contains("successful run completed") && !output.contains("fail:"),
        "{output}"
    );
    println!("32 MiB were read {rounds} times meanwhile");
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
