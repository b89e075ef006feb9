//! `stencil check` of real VMMs that map a template.

use serde_json::json;

use super::{failed, is_proven, set};
use crate::clones::dirty_exact::{SIZE, world};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::qemu_object::Guest;
use crate::vmm::firecracker_guests::{import_snapshot, launch};

#[test]
fn qemu_is_proven_and_its_options_that_copy_memory_fail() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let (world, digest) = world(serve);
        let memory = world.file(&digest, "memory");
        for (options, lost) in [
            ("readonly=on,rom=off,align=2M", None),
            ("readonly=on,rom=off,align=2M,prealloc=on", Some("not-copied")),
            ("readonly=on,share=on,align=2M", Some("private")),
            // QEMU's own choice of the address ends before other memory.
            ("readonly=on,rom=off", (serve == "passthrough").then_some("huge-entries")),
        ] {
            let object =
                format!("memory-backend-file,id=m,size={SIZE},mem-path={},{options}", memory.display());
            let mut guest = Guest::with_memory(&object, world.dir());
            guest.read(1 << 20);
            let words = [&guest.pid().to_string(), "--template", "web:1", "--serving", serve];
            match lost {
                None => {
                    guest.write(1 << 20, 9);
                    is_proven(&world, &words);
                }
                Some(property) => assert_eq!(failed(&world, &words), set(&[property]), "{serve} {options}"),
            }
            drop(guest);
            std::fs::remove_file(world.dir().join("qtest")).unwrap();
        }
        // The same memory from a plain file.
        let copy = world.dir().join("copy");
        std::fs::copy(&memory, &copy).unwrap();
        let object = format!("memory-backend-file,id=m,size={SIZE},mem-path={},share=off", copy.display());
        let guest = Guest::with_memory(&object, world.dir());
        assert_eq!(failed(&world, &[&guest.pid().to_string()]), set(&["template"]));
    }
}

#[test]
fn firecracker_with_a_balloon_is_proven() {
    let _host = host::shared();
    let world = TestMount::new("passthrough");
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 0});
    drop(import_snapshot(&world, &[("PUT /balloon", balloon)]));
    let mut clones = launch(&world, 2, &[]);
    is_proven(&world, &["--all", "--template", "fc:1"]);
    // The guest gives pages to the balloon: Firecracker maps other memory in their place.
    assert_eq!(clones[0].serial.ask('a'), "K");
    assert_eq!(clones[0].serial.ask('b'), "00000000 00000000 L");
    is_proven(&world, &[&clones[0].id, &clones[1].id]);
    world.stencil(&["stop", "--all"]).ok();
}
