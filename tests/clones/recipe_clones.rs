//! A guest with disks, a network card and a second serial port: each clone gets its own disks, ports and identity, and
//! the captured VM gets its original images back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::clones::accounting::{StoppedClones, assert_sums};
use crate::clones::disks::{Tmpfs, du};
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::vm::guest::{
    CAPTURED_MAC, Qemu, beats_in_image, beats_on_disk, devices, free_port, heartbeats, make_disk, media,
    overlays, patiently, root_is_on_disk, told,
};

/// Values that must be unique on a host, from QMP: name, UUID, VM generation ID, MAC address.
fn identity(qmp: &mut Qmp) -> [String; 4] {
    let mut query = |command: &str, field: &str| qmp.run(command, json!({})).unwrap()[field].to_string();
    let answers = [("query-name", "name"), ("query-uuid", "UUID"), ("query-vm-generation-id", "guid")]
        .map(|(c, f)| query(c, f));
    let card = json!({"path": "/machine/peripheral/eth", "property": "mac"});
    let [name, uuid, generation] = answers;
    [name, uuid, generation, qmp.run("qom-get", card).unwrap().to_string()]
}

fn count_of(line: &str) -> u64 {
    line.split(' ').next().unwrap().parse().unwrap()
}

/// Asserts that the heartbeats are numbered from 1 without gaps, and that there are at least `at_least` of them.
#[track_caller]
fn assert_complete(beats: &[String], at_least: u64) {
    for (line, number) in beats.iter().zip(1..) {
        assert_eq!(count_of(line), number, "after {:?}", beats.get(number as usize - 2));
    }
    assert!(
        beats.len() as u64 >= at_least,
        "{} heartbeats on the disk, expected at least {at_least}",
        beats.len()
    );
}

/// Clones whose directories are on a tmpfs; dropping stops the clones, then unmounts the tmpfs.
struct InMemory<'a>(&'a TestMount, Option<Tmpfs>);

impl Drop for InMemory<'_> {
    fn drop(&mut self) {
        self.0.stencil(&["stop", "--all"]);
        drop(self.1.take());
    }
}

/// Asserts that `stencil density` counts the overlays of the clones, which are on a tmpfs, to the byte.
fn assert_disks_are_counted(world: &TestMount, clones: &[Value]) {
    // Two measurements of a disk differ while the guest writes to it.
    let stopped = StoppedClones::of(&world.json(&["ps"]));
    let density = world.json(&["density", "--audit"]);
    assert_sums(&density);
    let disk_bytes = |clone: &Value| {
        let directory = Path::new(clone["dir"].as_str().unwrap());
        du(&["disk-root.qcow2", "disk-second.qcow2"].map(|name| directory.join(name)))
    };
    for clone in clones {
        let rows = density["clones"].as_array().unwrap();
        let row = rows.iter().find(|row| row["id"] == clone["id"]).unwrap();
        assert!(disk_bytes(clone) > 256 << 10, "{}", disk_bytes(clone));
        assert_eq!(row["disk_bytes"], disk_bytes(clone), "{row:#}");
    }
    let totals = &density["totals"];
    assert_eq!(totals["disk_bytes"], clones.iter().map(disk_bytes).sum::<u64>());
    drop(stopped);
    let parts = ["private_bytes", "page_table_bytes", "overhead_bytes", "disk_bytes"];
    let bytes_of_clones: u64 = parts.iter().map(|part| totals[part].as_u64().unwrap()).sum();
    assert_eq!(totals["bytes_per_further_clone"], bytes_of_clones / clones.len() as u64);
    // There is no baseline if a process of another scenario could not be inspected.
    if density["audit"]["memory"].is_object() {
        assert_eq!(density["audit"]["memory"]["accounted_bytes"], bytes_of_clones);
    }
}

#[test]
fn soak_clones_have_separate_disks_ports_and_identities() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let dir = world.dir();
    let disk = make_disk(dir, 3 << 20);
    let (raw, cd) = (dir.join("second.raw"), dir.join("cd.iso"));
    fs::write(&raw, vec![5; 1 << 20]).unwrap();
    fs::write(&cd, vec![6; 1 << 20]).unwrap();
    let port = free_port();
    let more = format!(
        "{} -name source -uuid 0f8ffa3c-6d0f-4d5c-b4e4-3f0a8b1f5a51 -blockdev driver=file,node-name=f,filename={} -blockdev driver=raw,node-name=second,file=f \
         -device virtio-blk-pci,drive=second -drive file={},media=cdrom,if=none,id=cd -device virtio-scsi-pci,id=s \
         -device scsi-cd,drive=cd,bus=s.0",
        devices(dir, &disk, port),
        raw.display(),
        cd.display()
    );
    let mut guest = Qemu::boot_with(dir, &more);
    root_is_on_disk(&dir.join("second.sock"));
    let vm_identity = identity(&mut guest.qmp());
    let before = media(&mut guest.qmp());
    let captured = world.json(&["capture", guest.socket().to_str().unwrap(), "vm:1"]);
    println!("the VM was paused for {} s", captured["pause_seconds"]);
    assert_eq!((&captured["vm"], &captured["warnings"]), (&json!("running"), &json!([])));
    assert_eq!(media(&mut guest.qmp()), before, "the VM must use its original images again");
    assert_eq!(overlays(dir), Vec::<PathBuf>::new());
    let names: Vec<_> = captured["files"].as_array().unwrap().iter().map(|f| f["name"].clone()).collect();
    assert_eq!(names, ["disk-cd", "disk-root", "disk-second", "initrd", "kernel", "memory", "state"]);
    let recipe = world.stencil(&["inspect", "--recipe", "vm:1"]).ok().out;
    assert!(!recipe.contains(dir.to_str().unwrap()) && !recipe.contains("52:54:00"), "{recipe}");

    // The VM continues to write to its disks, and these writes are not in the template.
    let now = guest.heartbeats().len();
    guest.wait_heartbeats(now + 3);
    let beats = beats_on_disk(port).unwrap();
    assert_complete(&beats, now as u64);

    let digest_of = |name: &str| {
        let out = dir.join(format!("exported-{name}"));
        world.stencil(&["export", &format!("vm:1/disk-{name}"), out.to_str().unwrap()]).ok();
        let digest = blake3::hash(&fs::read(&out).unwrap()).to_hex().to_string();
        fs::remove_file(out).unwrap();
        digest
    };
    let root_before = digest_of("root");
    assert_eq!(digest_of("second"), blake3::hash(&fs::read(&raw).unwrap()).to_hex().to_string());

    world.mount(&["--serve", "auto"]).ok();
    // Records and overlays are in RAM, as on most hosts, where /run is a tmpfs.
    let in_memory = world.runtime_dir().join("clones");
    let _tmpfs = InMemory(&world, Some(Tmpfs::on(&in_memory)));
    // The file that the clones have open as the base image.
    let base = world.file(captured["digest"].as_str().unwrap(), "disk-root");
    let served = || blake3::hash(&fs::read(&base).unwrap()).to_hex().to_string();
    assert_eq!(served(), root_before);
    let number: usize = host::rounds(3, 6);
    let launched = world.json(&["clone", "vm:1", "-n", &number.to_string()]);
    println!("{number} guests were running after {} s", launched["ready_seconds"]);
    let listed = world.json(&["ps"]);
    let clones = listed["clones"].as_array().unwrap();
    assert_eq!(clones.len(), number);

    // All at the same time: each clone serves on its own port the heartbeats that it has written to its own disk.
    std::thread::scope(|scope| {
        for clone in clones {
            scope.spawn(|| {
                let directory = Path::new(clone["dir"].as_str().unwrap());
                let port = clone["ports"]["80"].as_u64().unwrap() as u16;
                let first = patiently("a response", Duration::from_secs(60), || beats_on_disk(port));
                let later = patiently("a longer response", Duration::from_secs(60), || {
                    beats_on_disk(port).filter(|beats| beats.len() > first.len() + 2)
                });
                assert_complete(&later, first.len() as u64 + 2);
                // The response comes from this clone: its serial port has the same heartbeat.
                let beats = heartbeats(&directory.join("serial.log"));
                let last = later.last().unwrap();
                assert!(beats.iter().any(|b| last == &format!("{} {}", b.count, b.random)), "{last}");
                // The second serial port is a socket, through which the guest responds.
                let serial = directory.join("serial-1.sock");
                root_is_on_disk(&serial);
                let beat = &told(&serial, "who");
                assert!(count_of(beat) >= count_of(last), "{beat} after {last}");
            });
        }
    });

    let logs = world.stencil(&["logs", clones[0]["id"].as_str().unwrap()]).ok().out;
    let socket = Path::new(clones[0]["dir"].as_str().unwrap()).join("serial-1.sock");
    assert!(logs.contains(&format!("UNIX-CONNECT:{}", socket.display())), "{logs}");

    // A guest keeps the MAC address of its device state until its driver sets the address that QEMU gave to the card.
    for clone in clones {
        let directory = Path::new(clone["dir"].as_str().unwrap());
        let mut qmp = Qmp::connect(&directory.join("qmp.sock")).unwrap();
        let card = json!({"path": "/machine/peripheral/eth", "property": "mac"});
        let given = qmp.run("qom-get", card).unwrap().as_str().unwrap().to_owned();
        let mut used = || qmp.run("query-rx-filter", json!({})).unwrap()[0]["main-mac"].clone();
        assert_eq!(used(), CAPTURED_MAC);
        told(&directory.join("serial-1.sock"), &format!("mac {given}"));
        patiently("the new MAC address", Duration::from_secs(60), || (used() == given).then_some(()));
        let port = clone["ports"]["80"].as_u64().unwrap() as u16;
        patiently("a response through it", Duration::from_secs(60), || beats_on_disk(port));
    }

    // Values that must be unique on a host are different for all clones and the VM.
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); 8];
    for clone in clones {
        let directory = Path::new(clone["dir"].as_str().unwrap());
        let mut qmp = Qmp::connect(&directory.join("qmp.sock")).unwrap();
        let [name, uuid, generation, mac] = identity(&mut qmp);
        let local = u8::from_str_radix(&mac[1..3], 16).unwrap();
        assert_eq!(local & 3, 2, "the MAC address must be unicast and locally administered");
        let values = [
            name,
            uuid,
            generation,
            mac,
            clone["id"].to_string(),
            clone["ports"]["80"].to_string(),
            media(&mut qmp).to_string(),
            beats_on_disk(clone["ports"]["80"].as_u64().unwrap() as u16).unwrap().last().unwrap().clone(),
        ];
        for (all, one) in seen.iter_mut().zip(values) {
            all.insert(one);
        }
        for name in ["disk-root.qcow2", "disk-second.qcow2"] {
            let info =
                run("qemu-img", &["info", "-U", "--output=json", directory.join(name).to_str().unwrap()]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename-format"], "raw");
            let backing = info["backing-filename"].as_str().unwrap();
            assert!(backing.starts_with(world.mountpoint().to_str().unwrap()), "{backing}");
        }
    }
    assert!(seen.iter().all(|all| all.len() == number), "{seen:#?}");
    assert!(
        seen.iter().zip(&vm_identity).all(|(all, value)| !all.contains(value)),
        "{vm_identity:?} in {seen:#?}"
    );

    // The base image stays the same while all clones write.
    let written =
        || clones.iter().map(|c| beats_on_disk(c["ports"]["80"].as_u64().unwrap() as u16).unwrap().len());
    let first: Vec<usize> = written().collect();
    patiently("more heartbeats on all disks", Duration::from_secs(60), || {
        assert_eq!(served(), root_before, "the base image must not change");
        written().zip(&first).all(|(now, first)| now > *first).then_some(())
    });

    let images: Vec<PathBuf> =
        clones.iter().map(|c| Path::new(c["dir"].as_str().unwrap()).join("disk-root.qcow2")).collect();
    images.iter().for_each(|image| drop(run("qemu-img", &["check", "-q", "-U", image.to_str().unwrap()])));
    assert_disks_are_counted(&world, clones);
    world.stencil(&["stop", "--all"]).ok();
    assert_eq!(served(), root_before, "the base image must not change");
    assert!(images.iter().all(|image| !image.exists()), "the disk of a stopped clone must be removed");
    world.stencil(&["verify", "vm:1"]).ok();

    // The VM's image is consistent and has all heartbeats of the VM.
    let reported = guest.heartbeats().last().unwrap().count;
    guest.run("quit");
    patiently("end of QEMU", Duration::from_secs(10), || guest.has_ended().then_some(()));
    assert_complete(&beats_in_image(&disk, dir), reported - 1);
}

#[test]
fn soak_a_killed_capture_returns_the_disk_to_the_vm() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = make_disk(world.dir(), 24 << 20);
    let mut guest = Qemu::boot_with(world.dir(), &devices(world.dir(), &disk, free_port()));
    let before = media(&mut guest.qmp());
    let rounds = host::rounds(8, 30);
    let (mut finished, mut while_frozen) = (0, 0);
    for round in 0..rounds {
        let mut command = world.command();
        command.arg("capture").arg(guest.socket()).arg(format!("vm:k{round}"));
        // The helper of the capture outlives the capture and logs here.
        let log =
            fs::File::options().create(true).append(true).open(world.dir().join("captures.log")).unwrap();
        let mut capture = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        // Every other capture is killed up to 400 ms after the disk is frozen, the others up to 400 ms after their
        // start.
        if round % 2 == 0 {
            for _ in 0..400 {
                if !overlays(world.dir()).is_empty() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        std::thread::sleep(Duration::from_millis(round * 97 % 400));
        while_frozen += usize::from(!overlays(world.dir()).is_empty());
        let _ = kill_process(Pid::from_raw(capture.id() as i32).unwrap(), Signal::KILL);
        finished += usize::from(capture.wait().unwrap().success());
        let end = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            // This loop connects rarely: a QMP socket serves one client at a time, and the helper needs the socket too.
            std::thread::sleep(Duration::from_millis(50));
            let Ok(mut qmp) = Qmp::connect(&guest.socket()) else { continue };
            let (status, disks, left) = (qmp.status().unwrap(), media(&mut qmp), overlays(world.dir()));
            if status == "running" && disks == before && left.is_empty() {
                break;
            }
            let log = fs::read_to_string(world.dir().join("captures.log")).unwrap();
            assert!(std::time::Instant::now() < end, "round {round}: {status}, {disks}, {left:?}: {log}");
        }
        let beats = guest.heartbeats().len();
        guest.wait_heartbeats(beats + 1);
    }
    println!(
        "{rounds} captures: {while_frozen} killed while the disk was frozen, {finished} finished before the signal"
    );
    assert!(while_frozen > 0);
    world.json(&["capture", guest.socket().to_str().unwrap(), "vm:whole"]);
    let reported = guest.heartbeats().last().unwrap().count;
    guest.run("quit");
    patiently("end of QEMU", Duration::from_secs(10), || guest.has_ended().then_some(()));
    assert_complete(&beats_in_image(&disk, world.dir()), reported - 1);
}

#[test]
fn soak_a_vm_that_dies_during_capture_loses_no_writes() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = make_disk(world.dir(), 24 << 20);
    let frozen = || overlays(world.dir()).pop();
    let grown = || fs::metadata(frozen()?).is_ok_and(|about| about.len() > 256 << 10).then_some(());
    for &with_capture in host::rounds(&[true][..], &[false, true]) {
        let mut guest = Qemu::boot_with(world.dir(), &devices(world.dir(), &disk, free_port()));
        // Stops the capture while it reads the disk, until the guest has written to the overlay. At first the capture
        // has the guest paused too: then the capture is continued for a moment.
        let mut capture = (0..20)
            .find_map(|_| {
                let mut command = world.command();
                command.arg("capture").arg(guest.socket()).arg("vm:x");
                let mut capture = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                let pid = Pid::from_raw(capture.id() as i32).unwrap();
                while capture.try_wait().unwrap().is_none() {
                    if frozen().is_some() {
                        kill_process(pid, Signal::STOP).unwrap();
                        let beats = guest.heartbeats().len();
                        for _ in 0..100 {
                            std::thread::sleep(Duration::from_millis(50));
                            match grown() {
                                Some(()) => return Some(capture),
                                // The guest runs, and will soon have written enough.
                                None if guest.heartbeats().len() > beats => {}
                                None => {
                                    kill_process(pid, Signal::CONT).unwrap();
                                    std::thread::sleep(Duration::from_millis(2));
                                    kill_process(pid, Signal::STOP).unwrap();
                                }
                            }
                        }
                        kill_process(pid, Signal::CONT).unwrap();
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                None
            })
            .expect("no capture was stopped while it read the disk");
        let beats = guest.heartbeats().len();
        guest.wait_heartbeats(beats + 2);
        guest.kill();
        let reported = guest.heartbeats().last().unwrap().count;
        let pid = Pid::from_raw(capture.id() as i32).unwrap();
        kill_process(pid, if with_capture { Signal::KILL } else { Signal::CONT }).unwrap();
        let status = capture.wait().unwrap();
        patiently("removal of the overlay", Duration::from_secs(30), || {
            overlays(world.dir()).is_empty().then_some(())
        });
        println!("capture ended with {status}, {reported} heartbeats");
        // Each guest boots from the same image and counts from 1 again: check the last one.
        let beats = beats_in_image(&disk, world.dir());
        let start = beats.iter().rposition(|line| count_of(line) == 1).unwrap();
        assert_complete(&beats[start..], reported - 1);
        fs::remove_file(world.dir().join("serial")).unwrap();
    }
}
