//! A guest on a bridge and its clones: the clones send no packet before they have their own addresses.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::vm::guest::{CAPTURED_MAC, Qemu, patiently, told};

/// Moves this thread and its future children into a new network namespace.
fn private_network() -> Running {
    let inode = |path: &str| fs::read_link(path).unwrap();
    let child = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
    let place = format!("/proc/{}/ns/net", child.id());
    patiently("a network namespace", Duration::from_secs(10), || {
        (inode(&place) != inode("/proc/thread-self/ns/net")).then_some(())
    });
    let namespace = File::open(&place).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    Running(child)
}

/// Returns the ports of the bridge, and the number of packets that the guest behind each port has sent.
fn taps() -> Vec<(String, u64)> {
    let all: Value =
        serde_json::from_str(&run("ip", &["-j", "-s", "link", "show", "master", "br0"])).unwrap();
    let one = |l: &Value| {
        (l["ifname"].as_str().unwrap().to_owned(), l["stats64"]["rx"]["packets"].as_u64().unwrap())
    };
    all.as_array().unwrap().iter().map(one).collect()
}

/// Returns the bridge port on which the bridge has learned this address.
fn port_of(mac: &str) -> Option<String> {
    let all = run("bridge", &["fdb", "show", "br", "br0"]);
    let line = all.lines().find(|line| line.starts_with(mac) && !line.contains("permanent"))?;
    Some(line.split(' ').nth(2).unwrap().to_owned())
}

#[test]
fn clones_on_a_bridge_stay_silent_until_they_have_addresses() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.mount(&[]).ok();
    let _network = private_network();
    run("ip", &["link", "add", "br0", "type", "bridge"]);
    run("ip", &["link", "set", "br0", "up"]);
    let script = world.dir().join("up");
    fs::write(&script, "#!/bin/sh\nip link set \"$1\" master br0 && ip link set \"$1\" up\n").unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let (dir, script) = (world.dir().display(), script.display());
    let guest = Qemu::boot_with(
        world.dir(),
        &format!(
            "-netdev tap,id=lan,script={script},downscript=no \
             -device virtio-net,netdev=lan,id=eth,mac={CAPTURED_MAC} -serial unix:{dir}/second.sock,server=on,wait=off"
        ),
    );
    told(&world.dir().join("second.sock"), &format!("mac {CAPTURED_MAC}"));
    patiently("the captured guest's address on the bridge", Duration::from_secs(30), || {
        port_of(CAPTURED_MAC)
    });
    let captured_port = port_of(CAPTURED_MAC);

    let captured = world.json(&["capture", guest.socket().to_str().unwrap(), "vm:1"]);
    assert!(captured["warnings"].to_string().contains("cut off until QMP set_link"), "{captured}");
    let before: Vec<String> = taps().into_iter().map(|(name, _)| name).collect();
    let done = world.stencil(&["--json", "clone", "vm:1", "-n", "2"]).ok();
    assert!(done.err.contains("note: the network lan is cut off"), "{}", done.err);
    let launched: Value = serde_json::from_str(&done.out).unwrap();
    assert!(launched["warnings"][0].as_str().unwrap().contains("name=lan"), "{launched}");

    let clone_ports = || taps().into_iter().filter(|(name, _)| !before.contains(name)).collect::<Vec<_>>();
    assert_eq!(clone_ports().len(), 2);
    for clone in launched["clones"].as_array().unwrap() {
        let folder = Path::new(clone["dir"].as_str().unwrap());
        let port = folder.join("serial-1.sock");
        // The clone announces the captured address, but its network is cut off.
        told(&port, &format!("mac {CAPTURED_MAC}"));
        let mut qmp = Qmp::connect(&folder.join("qmp.sock")).unwrap();
        let card = json!({"path": "/machine/peripheral/eth", "property": "mac"});
        let given = qmp.run("qom-get", card).unwrap().as_str().unwrap().to_owned();
        told(&port, &format!("mac {given}"));
        assert_eq!((port_of(CAPTURED_MAC), port_of(&given)), (captured_port.clone(), None));
        qmp.run("set_link", json!({"name": "lan", "up": true})).unwrap();
        let place = patiently("the clone's address on the bridge", Duration::from_secs(30), || {
            told(&port, &format!("mac {given}"));
            port_of(&given)
        });
        assert!(clone_ports().iter().any(|(name, sent)| *name == place && *sent > 0), "{place}");
        assert_eq!(
            port_of(CAPTURED_MAC),
            captured_port,
            "the captured guest's address is still learned on its own port"
        );
        // The clone that is still cut off has sent nothing.
        let silent = clone_ports().iter().filter(|(_, sent)| *sent == 0).count();
        assert_eq!(silent, if clone == &launched["clones"][0] { 1 } else { 0 });
    }
    world.stencil(&["stop", "--all"]).ok();
}
