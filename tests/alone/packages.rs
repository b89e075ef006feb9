//! The README's commands, with the package.

use std::fs;

use crate::packages::{installed, wait_unmounted};
use crate::support::debian::Debian;
use crate::support::host;
use crate::support::store::random;

#[test]
fn the_ten_lines_of_the_readme_run_as_they_stand() {
    let _host = host::alone();
    let debian = Debian::new();
    installed(&debian).ok();
    fs::write(debian.path("/root/guest.state"), random(4, 1 << 16)).unwrap();
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let lines = readme.split("## Ten lines\n\n```sh\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(lines.lines().count() >= 6, "{lines}");
    let done = debian.sh(&format!("cd /root && set -ex\n{lines}")).ok();
    assert!(done.out.contains("100 clones take") && done.out.contains("100 stopped"), "{}", done.out);
    wait_unmounted(&debian);
}
