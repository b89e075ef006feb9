//! A Firecracker with the UFFD backend: its page-fault handler maps the template, and the Firecracker maps none.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::actor::{Actor, compile};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::firecracker::{Firecracker, MEMORY_MIB, WRITTEN_PAGES};
use crate::vmm::firecracker_guests::import_snapshot;

const PAGE: u64 = 4096;

struct Handler(Child);

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_page_fault_handler_is_no_clone_and_the_firecracker_that_it_serves_is_named() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    drop(import_snapshot(&world, &[]));
    let digest = world.json(&["inspect", "fc:1"])["digest"].as_str().unwrap().to_owned();
    let socket = world.dir().join("faults.sock");
    let mut handler = Command::new(compile("fault_handler"));
    let handler = handler.arg0("fault_handler").arg(&socket).arg(world.file(&digest, "memory"));
    let mut handler = Handler(handler.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(handler.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let directory = world.dir().join("restored");
    std::fs::create_dir(&directory).unwrap();
    let mut vmm = Firecracker::start(&directory);
    vmm.load(&json!({
        "snapshot_path": world.file(&digest, "state"),
        "mem_backend": {"backend_type": "Uffd", "backend_path": socket},
        "resume_vm": true,
    }));
    assert_eq!(vmm.serial.ask('r'), "K", "the guest has the bytes of the template");
    assert_eq!(vmm.serial.ask('w'), "W");
    // A clone: the only one.
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), MEMORY_MIB << 20));
    clone.write_pages(0, 0..10);
    let (reader, served) = (handler.0.id(), vmm.pid());

    let ps = world.json(&["ps"]);
    let rows: Vec<[&Value; 2]> =
        ps["clones"].as_array().unwrap().iter().map(|row| [&row["pid"], &row["kind"]]).collect();
    assert_eq!(
        rows,
        [[&json!(reader), &json!("page-faults")], [&json!(clone.pid()), &json!("other")]],
        "{ps:#}"
    );
    let serves = |handler: &Value| {
        let serves = handler["serves"].as_array().unwrap();
        assert_eq!(
            (serves.len(), &serves[0]["pid"], &serves[0]["command"]),
            (1, &json!(served), &json!("firecracker"))
        );
        serves[0]["private_bytes"].as_u64().unwrap()
    };
    serves(&ps["clones"][0]);

    let density = world.json(&["density", "--audit"]);
    let (totals, frames) = (&density["totals"], &density["audit"]["frames"]);
    assert_eq!([&totals["clones"], &totals["private_bytes"]], [&json!(1), &json!(10 * PAGE)], "{density:#}");
    assert_eq!(density["clones"][0]["pid"], clone.pid());
    assert_eq!(density["templates"][0]["clones"], 1);
    assert_eq!(frames["verdict"], "ok", "{frames:#}");
    let handlers = density["handlers"].as_array().unwrap();
    assert_eq!(
        (handlers.len(), &handlers[0]["pid"], &handlers[0]["digest"]),
        (1, &json!(reader), &json!(digest))
    );
    // The guest has read 512 pages and written others, each of them a copy.
    assert!(serves(&handlers[0]) > (512 + WRITTEN_PAGES) * PAGE, "{handlers:#?}");
    let warning = world.stencil(&["density"]).ok().err;
    assert!(
        warning.contains(&format!("process {served} (firecracker"))
            && warning.contains("it is not counted as a clone"),
        "{warning}"
    );
    assert_eq!(world.status()["templates"][0]["clones"], 1);

    let check = world.stencil(&["--json", "check", "--all"]).exits(6).out;
    let check: Value = serde_json::from_str(&check).unwrap();
    let row = check["clones"].as_array().unwrap().iter().find(|row| row["pid"] == reader).unwrap();
    let failed = row["checks"].as_array().unwrap().iter().find(|check| check["ok"] == false).unwrap();
    let why = failed["why"].as_str().unwrap();
    assert_eq!([&failed["name"], &failed["remedy"]], ["template", "use the File backend"], "{check:#}");
    assert!(why.contains(&format!("the memory of process {served} (firecracker")), "{why}");

    let refused = world.stencil(&["rm", "fc:1"]).exits(5).err;
    let text = format!("process {reader} handles page faults of process {served} (firecracker");
    assert!(refused.contains(&text) && refused.contains("would wait forever"), "{refused}");
    let refused = world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).exits(5).err;
    assert!(refused.contains(&format!("handles page faults of process {served}")), "{refused}");

    // Without the process that it serves, the handler is a handler still.
    drop(vmm);
    let density = world.json(&["density"]);
    assert_eq!([&density["totals"]["clones"], &density["handlers"][0]["serves"]], [&json!(1), &json!([])]);
    // A process that has its own memory registered is a clone, also if it cannot write to its mapping.
    let mut reader = Actor::start();
    reader.tell(&format!("map 0 {} 0 {} ro", world.file(&digest, "memory").display(), MEMORY_MIB << 20));
    reader.tell(&format!("track 0 {}", MEMORY_MIB << 20));
    let density = world.json(&["density"]);
    assert_eq!(density["totals"]["clones"], 2, "{density:#}");
    assert_eq!(density["handlers"].as_array().unwrap().len(), 1, "{density:#}");
}
