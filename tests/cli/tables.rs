//! Tables fit 100 columns and lose nothing, whatever the length of names, also in a file.

use std::fs::{self, File};

use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::guest_like;

/// Maximum width of a table.
const WIDTH: usize = 100;

#[test]
fn tables_with_long_names_fit_100_columns() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let name = |first: char, rest: char| format!("{first}{}", rest.to_string().repeat(127));
    let (tag, file) = (format!("{}:{}", name('n', 'J'), name('t', 'X')), name('f', 'j'));
    let source = world.dir().join("source");
    fs::write(&source, guest_like(1, 1 << 20)).unwrap();
    let source = source.to_str().unwrap();
    world.stencil(&["import", source, &tag, "--file", &format!("{file}={source}")]).ok();
    world.stencil(&["tag", &tag, "web:1"]).ok();
    let launched = world.json(&["clone", &tag, "-n", "2", "--simulate", "read=5%,write=5%"]);
    let pid = launched["clones"][0]["pid"].as_u64().unwrap();
    let process = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    wait_for("the record of the exit", || {
        let rows = world.json(&["ps"])["clones"].as_array().unwrap().clone();
        rows.iter().any(|row| row["ended"].is_object()).then_some(())
    });
    // Each command, the first word of its heading, and the letters of the long names in its rows.
    for (command, heading, letters) in [
        (&["ls"][..], "NAME", &["J", "X", "j"][..]),
        (&["du"], "TEMPLATE", &["J", "X"]),
        (&["ps"], "ID", &["J", "X"]),
        (&["density", "--wide"], "TEMPLATE", &["J", "X"]),
        (&["density", "--by", "template"], "GROUP", &["J", "X"]),
        (&["status"], "TEMPLATE", &["j"]),
    ] {
        let out = world.dir().join("out");
        let status = world.command().args(command).stdout(File::create(&out).unwrap()).status().unwrap();
        assert!(status.success(), "{command:?}");
        let text = fs::read_to_string(&out).unwrap();
        let table: Vec<&str> =
            text.lines().skip_while(|line| line.split_whitespace().next() != Some(heading)).collect();
        assert!(table.len() > 3, "{command:?}: {text}");
        for line in &table {
            assert!(line.chars().count() <= WIDTH, "{command:?}: {line}\n{text}");
            assert_eq!(line.trim_end(), *line, "{command:?}");
        }
        for letter in letters {
            let count = table.iter().flat_map(|line| line.matches(letter)).count();
            assert!(count > 0 && count % 127 == 0, "{command:?}: {count} times {letter}\n{text}");
        }
    }
}
