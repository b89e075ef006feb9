//! Migration settings that a VM manager made before a capture: none of them prevents the capture, and all of them are
//! restored, even if the capture is killed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::capture::failures::{DiskOption, Vm};
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::{Qemu, patiently, qemu_words};

/// Returns all migration capabilities and parameters.
fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"].map(|c| qmp.run(c, json!({})).unwrap())
}

fn set(qmp: &mut Qmp, capabilities: &[&str], on: bool) {
    let all: Vec<Value> = capabilities.iter().map(|c| json!({"capability": c, "state": on})).collect();
    qmp.run("migrate-set-capabilities", json!({"capabilities": all})).unwrap();
}

/// Capabilities that a manager may have set, each with the capabilities that it requires.
const CAPABILITIES: [&[&str]; 19] = [
    &["xbzrle"],
    &["rdma-pin-all"],
    &["auto-converge"],
    &["zero-blocks"],
    &["events"],
    &["postcopy-ram"],
    &["postcopy-ram", "postcopy-preempt"],
    &["x-colo"],
    &["release-ram"],
    &["return-path"],
    &["return-path", "switchover-ack"],
    &["pause-before-switchover"],
    &["multifd"],
    &["multifd", "zero-copy-send"],
    &["dirty-bitmaps"],
    &["late-block-activate"],
    &["x-ignore-shared"],
    &["validate-uuid"],
    &["mapped-ram", "multifd"],
];

/// Parameters that a manager may have set.
fn parameters() -> Vec<Value> {
    vec![
        json!({"max-bandwidth": 4096}),
        json!({"max-bandwidth": 4096, "downtime-limit": 1}),
        json!({"avail-switchover-bandwidth": 1, "downtime-limit": 0}),
        json!({"tls-creds": "tls0", "tls-hostname": "host", "tls-authz": "authz0"}),
        json!({"mode": "cpr-reboot"}),
        json!({"mode": "cpr-transfer"}),
        json!({"zero-page-detection": "none"}),
        json!({"zero-page-detection": "legacy"}),
        json!({"multifd-channels": 4, "multifd-compression": "zlib"}),
        json!({"direct-io": true}),
        json!({"xbzrle-cache-size": 1 << 20, "announce-rounds": 0, "max-postcopy-bandwidth": 1}),
        json!({"block-bitmap-mapping": [{"node-name": "root", "alias": "a", "bitmaps": []}]}),
    ]
}

#[test]
fn capture_restores_every_migration_setting() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mut words = qemu_words(world.dir(), "16M");
    // Video memory is part of the device state: with a low bandwidth limit its transfer would take minutes.
    words.extend(["-device", "VGA,vgamem_mb=16"].map(str::to_owned));
    let qemu = Qemu::start(world.dir(), &words);
    let socket = qemu.socket();
    let capture = |what: &str, before: &[Value; 2]| {
        let start = Instant::now();
        let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:x"]);
        assert_eq!(captured["vm"], "running", "{what}");
        assert_eq!(&settings(&mut qemu.qmp()), before, "{what}");
        assert_eq!(qemu.status(), "running", "{what}");
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", start.elapsed());
        captured["state_bytes"].as_u64().unwrap()
    };
    let before = settings(&mut qemu.qmp());
    let plain = capture("no settings", &before);
    for capabilities in CAPABILITIES {
        set(&mut qemu.qmp(), capabilities, true);
        let before = settings(&mut qemu.qmp());
        capture(&format!("{capabilities:?}"), &before);
        set(&mut qemu.qmp(), capabilities, false);
    }
    let defaults = qemu.qmp().run("query-migrate-parameters", json!({})).unwrap();
    for changed in parameters() {
        qemu.qmp().run("migrate-set-parameters", changed.clone()).unwrap();
        let before = settings(&mut qemu.qmp());
        let bytes = capture(&changed.to_string(), &before);
        assert!(
            bytes < plain + (1 << 20),
            "{changed}: {bytes} bytes of device state, {plain} without settings"
        );
        let original: Value =
            changed.as_object().unwrap().keys().map(|k| (k.clone(), defaults[k].clone())).collect();
        if !original["block-bitmap-mapping"].is_null() || changed["block-bitmap-mapping"].is_null() {
            qemu.qmp().run("migrate-set-parameters", original).unwrap();
        }
    }
}

#[test]
fn migration_settings_are_restored_after_a_killed_capture() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    for (capabilities, parameters) in [
        (&["pause-before-switchover", "events"][..], json!({"max-bandwidth": 4096})),
        (&["multifd", "mapped-ram"], json!({"mode": "cpr-reboot", "direct-io": true})),
        (&["return-path", "postcopy-ram"], json!({"tls-creds": "tls0", "zero-page-detection": "none"})),
    ] {
        set(&mut vm.qmp, capabilities, true);
        let defaults = vm.qmp.run("query-migrate-parameters", json!({})).unwrap();
        vm.qmp.run("migrate-set-parameters", parameters.clone()).unwrap();
        let before = settings(&mut vm.qmp);
        vm.stop_capture_at(&[], Vm::state_is_written).kill();
        patiently("the restored settings", Duration::from_secs(20), || {
            (settings(&mut vm.qmp) == before && vm.helpers().is_empty()).then_some(())
        });
        vm.wait_restored();
        set(&mut vm.qmp, capabilities, false);
        let original: Value =
            parameters.as_object().unwrap().keys().map(|k| (k.clone(), defaults[k].clone())).collect();
        vm.qmp.run("migrate-set-parameters", original).unwrap();
    }
    vm.quit();
}

#[test]
fn a_clone_has_the_migration_settings_of_its_command_line() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mut words = qemu_words(world.dir(), "16M");
    words.extend(
        ["-global", "migration.x-multifd=on", "-global", "migration.x-max-bandwidth=4096"].map(str::to_owned),
    );
    let qemu = Qemu::start(world.dir(), &words);
    let before = settings(&mut qemu.qmp());
    world.json(&["capture", qemu.socket().to_str().unwrap(), "vm:1"]);
    assert_eq!(settings(&mut qemu.qmp()), before);
    let launched = world.json(&["clone", "vm:1"]);
    let dir = launched["clones"][0]["dir"].as_str().unwrap();
    let mut qmp = Qmp::connect(&std::path::Path::new(dir).join("qmp.sock")).unwrap();
    assert_eq!(qmp.status().unwrap(), "running");
    assert_eq!(settings(&mut qmp), before);
    world.stencil(&["stop", "--all"]).ok();
}

#[test]
fn capture_names_the_job_or_migration_that_uses_the_vm() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let target = vm.dir().join("backup");
    let job = json!({"job-id": "nightly", "device": "root", "target": target, "sync": "full", "speed": 1,
                     "format": "qcow2"});
    vm.qmp.run("drive-backup", job).unwrap();
    let run = vm.capture(&[]).output().unwrap();
    let run = crate::support::mount::Run::of("capture".into(), &run).exits(5);
    assert!(
        run.err.contains("in use by backup job 'nightly'") && run.err.contains("job-cancel"),
        "{}",
        run.err
    );
    vm.qmp.run("block-job-cancel", json!({"device": "nightly", "force": true})).unwrap();
    patiently("the end of the backup job", Duration::from_secs(10), || {
        (vm.qmp.run("query-jobs", json!({})).unwrap() == json!([])).then_some(())
    });

    // A migration by another client, which waits for that client.
    set(&mut vm.qmp, &["pause-before-switchover"], true);
    vm.qmp.run("migrate", json!({"uri": "exec:cat >/dev/null"})).unwrap();
    let phase = |vm: &mut Vm| vm.qmp.run("query-migrate", json!({})).unwrap()["status"].clone();
    patiently("the switchover", Duration::from_secs(30), || {
        (phase(&mut vm) == "pre-switchover").then_some(())
    });
    let run = vm.capture(&[]).output().unwrap();
    let run = crate::support::mount::Run::of("capture".into(), &run);
    assert!(run.err.contains("pre-switchover") && run.code != 75, "{run:?}");
    vm.qmp.run("migrate_cancel", json!({})).unwrap();
    patiently("the cancelled migration", Duration::from_secs(10), || {
        (phase(&mut vm) == "cancelled").then_some(())
    });
    set(&mut vm.qmp, &["pause-before-switchover"], false);
    vm.qmp.run("cont", json!({})).unwrap();
    vm.wait_restored();
    vm.quit();
}
