//! Both audits of `stencil density`: page frames and available memory of the host agree with the accounting.

use serde_json::Value;

use crate::clones::accounting::{MIB, PAGE, StoppedClones, assert_sums, number, world};
use crate::support::actor::Actor;
use crate::support::mount::TestMount;
use crate::support::{host, vm::guest};

#[test]
fn page_frame_audit_matches_the_accounting_after_forks() {
    let _host = host::alone();
    for serve in ["decode", "passthrough"] {
        let (world, digest) = world(serve, 64 * MIB);
        world.stencil(&["clone", "web:1", "-n", "40", "--simulate", "read=500p,write=500p"]).ok();
        let mut parent = Actor::start();
        parent.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 64 * MIB));
        parent.write_pages(0, 0..2000);
        parent.tell("fork 0 1 2 3 9000 9001");
        let density = world.json(&["density", "--audit"]);
        assert_sums(&density);
        assert_eq!(number(&density["totals"], "private_bytes"), (40 * 500 + 2000 + 5) * PAGE);
        let frames = &density["audit"]["frames"];
        assert!(frames["error_percent"].as_f64().unwrap() <= 0.5, "{frames:#}");
        assert_eq!(number(frames, "private_bytes"), number(frames, "private_accounted"), "{frames:#}");
        assert_eq!((number(frames, "unknown_processes"), number(frames, "unexplained_mappings")), (0, 0));
        assert!(number(frames, "template_bytes") > MIB, "{frames:#}");
        world.stencil(&["stop", "--all"]).ok();
    }
}

#[test]
fn soak_memory_audit_agrees_over_three_simulated_launches() {
    let _host = host::alone();
    let (world, _) = world("passthrough", 256 * MIB);
    // The pages of the template are in the page cache before the first baseline.
    world.stencil(&["clone", "web:1", "--simulate", "read=100%"]).ok();
    world.stencil(&["stop", "--all"]).ok();
    let clones: u64 = host::rounds(40, 150);
    for _ in 0..3 {
        audits_agree_within(3.0, || {
            let count = clones.to_string();
            world.stencil(&["clone", "web:1", "-n", &count, "--simulate", "read=8M,write=4M"]).ok();
            let density = world.json(&["density", "--audit"]);
            assert_sums(&density);
            assert_eq!(number(&density["totals"], "private_bytes"), clones * 4 * MIB);
            world.stencil(&["stop", "--all"]).ok();
            density["audit"].clone()
        });
    }
}

/// Calls `measure`, which launches, audits and stops clones. Panics if the audit of page frames is off by more than
/// 0.5 %, or the audit of available memory, which depends on the whole host, by more than `percent`.
#[track_caller]
fn audits_agree_within(percent: f64, measure: impl Fn() -> Value) {
    host::measured(|| {
        host::settle();
        let audit = measure();
        println!("{audit}");
        let error = |which: &str| {
            audit[which]["error_percent"].as_f64().unwrap_or_else(|| panic!("no {which} in {audit:#}"))
        };
        let agree = error("frames") <= 0.5 && error("memory") <= percent;
        if agree {
            Ok(())
        } else {
            Err(format!("an audit is off by more than 0.5 % (frames) or {percent} % (memory): {audit}"))
        }
    });
}

#[test]
fn memory_audit_agrees_for_eight_qemu_guests() {
    let _host = host::alone();
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&["--serve", "passthrough"]).ok();
    world.stencil(&["clone", "guest:v1", "--simulate", "read=100%"]).ok();
    world.stencil(&["stop", "--all"]).ok();
    audits_agree_within(5.0, || {
        world.stencil(&["clone", "guest:v1", "-n", "8"]).ok();
        // QEMU allocates memory while it translates code (TCG): the guests are stopped between both measurements.
        let stopped = StoppedClones::of(&world.json(&["ps"]));
        let density = world.json(&["density", "--audit"]);
        drop(stopped);
        assert_sums(&density);
        let clones = density["clones"].as_array().unwrap();
        assert_eq!(clones.len(), 8);
        for clone in clones {
            assert_eq!(clone["kind"], "qemu");
            // Most mapped pages are shared: private copies are a small part.
            assert!(number(clone, "private_bytes") > 0, "{clone:#}");
            assert!(number(clone, "private_bytes") * 10 < number(clone, "mapped_bytes"), "{clone:#}");
        }
        world.stencil(&["stop", "--all"]).ok();
        density["audit"].clone()
    });
}
