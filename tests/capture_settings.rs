//! Settings of migrations that a manager has made before a capture: none of them stands in its way, and all of them are
//! as before afterwards, also when the capture is killed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::capture_failures::{Plug, Vm};
use crate::support::guest::{Qemu, patiently, qemu_words};
use crate::support::host;
use crate::support::mount::TestMount;

/// All capabilities and parameters.
fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"].map(|c| qmp.run(c, json!({})).unwrap())
}

fn set(qmp: &mut Qmp, capabilities: &[&str], on: bool) {
    let all: Vec<Value> = capabilities.iter().map(|c| json!({"capability": c, "state": on})).collect();
    qmp.run("migrate-set-capabilities", json!({"capabilities": all})).unwrap();
}

/// What a manager may have set, with what else it needs.
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

/// The same for parameters.
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
fn every_setting_of_migrations_is_as_before() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let mut words = qemu_words(world.dir(), "16M");
    // Memory that is part of the device state: a low limit would make it take minutes.
    words.extend(["-device", "VGA,vgamem_mb=16"].map(str::to_owned));
    let qemu = Qemu::start(world.dir(), &words);
    let socket = qemu.socket();
    let captures = |what: &str, before: &[Value; 2]| {
        let begin = Instant::now();
        let captured = world.json(&["capture", socket.to_str().unwrap(), "vm:x"]);
        assert_eq!(captured["vm"], "running", "{what}");
        assert_eq!(&settings(&mut qemu.qmp()), before, "{what}");
        assert_eq!(qemu.status(), "running", "{what}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}: {:?}", begin.elapsed());
        captured["state_bytes"].as_u64().unwrap()
    };
    let before = settings(&mut qemu.qmp());
    let plain = captures("nothing", &before);
    for capabilities in CAPABILITIES {
        set(&mut qemu.qmp(), capabilities, true);
        let before = settings(&mut qemu.qmp());
        captures(&format!("{capabilities:?}"), &before);
        set(&mut qemu.qmp(), capabilities, false);
    }
    let first = qemu.qmp().run("query-migrate-parameters", json!({})).unwrap();
    for changed in parameters() {
        qemu.qmp().run("migrate-set-parameters", changed.clone()).unwrap();
        let before = settings(&mut qemu.qmp());
        let bytes = captures(&changed.to_string(), &before);
        assert!(bytes < plain + (1 << 20), "{changed}: {bytes} bytes of device state, {plain} before");
        let old: Value = changed.as_object().unwrap().keys().map(|k| (k.clone(), first[k].clone())).collect();
        if !old["block-bitmap-mapping"].is_null() || changed["block-bitmap-mapping"].is_null() {
            qemu.qmp().run("migrate-set-parameters", old).unwrap();
        }
    }
}

#[test]
fn a_killed_capture_gives_all_settings_back() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    for (capabilities, parameters) in [
        (&["pause-before-switchover", "events"][..], json!({"max-bandwidth": 4096})),
        (&["multifd", "mapped-ram"], json!({"mode": "cpr-reboot", "direct-io": true})),
        (&["return-path", "postcopy-ram"], json!({"tls-creds": "tls0", "zero-page-detection": "none"})),
    ] {
        set(&mut vm.qmp, capabilities, true);
        let first = vm.qmp.run("query-migrate-parameters", json!({})).unwrap();
        vm.qmp.run("migrate-set-parameters", parameters.clone()).unwrap();
        let before = settings(&mut vm.qmp);
        vm.caught(&[], Vm::is_read).killed();
        patiently("settings as before", Duration::from_secs(20), || {
            (settings(&mut vm.qmp) == before && vm.helpers().is_empty()).then_some(())
        });
        vm.is_as_before();
        set(&mut vm.qmp, capabilities, false);
        let old: Value =
            parameters.as_object().unwrap().keys().map(|k| (k.clone(), first[k].clone())).collect();
        vm.qmp.run("migrate-set-parameters", old).unwrap();
    }
    vm.end();
}

#[test]
fn a_clone_has_the_settings_of_its_command_line() {
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
fn a_vm_that_is_busy_is_told_with_what() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let target = vm.folder().join("backup");
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
    patiently("the job's end", Duration::from_secs(10), || {
        (vm.qmp.run("query-jobs", json!({})).unwrap() == json!([])).then_some(())
    });

    // A migration of somebody else, that waits for him.
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
    patiently("its end", Duration::from_secs(10), || (phase(&mut vm) == "cancelled").then_some(()));
    set(&mut vm.qmp, &["pause-before-switchover"], false);
    vm.qmp.run("cont", json!({})).unwrap();
    vm.is_as_before();
    vm.end();
}
