//! A VMM that maps another file with the bytes of the template.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::json;
use stencilfs::sys::memory::cachestat;

use super::{none, reasons};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::firecracker::Firecracker;
use crate::vmm::firecracker_guests::import_snapshot;

#[test]
fn a_firecracker_on_a_plain_copy_of_the_memory_is_named() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    drop(import_snapshot(&world, &[]));
    let why = || world.json(&["density", "--why"])["templates"][0].clone();
    assert_eq!(reasons(&why()), none());
    let (source, other) = (world.dir().join("source"), world.dir().join("other"));
    std::fs::create_dir(&other).unwrap();
    let memory = source.join("memory");
    let firecracker = Firecracker::start(&other);
    let backend = json!({"backend_type": "File", "backend_path": memory});
    firecracker.load(&json!({"snapshot_path": source.join("state"), "mem_backend": backend}));
    let cached = cachestat::cached(File::open(&memory).unwrap()).unwrap().bytes().get();
    assert!(cached > 1 << 20);
    assert_eq!(reasons(&why()).get("copied-file"), Some(&cached));
    // One other byte, and it is another file.
    let file = File::options().read(true).write(true).open(&memory).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5 << 20).unwrap();
    file.write_all_at(&[!byte[0]], 5 << 20).unwrap();
    assert_eq!(reasons(&why()), none());
    drop(firecracker);
}
