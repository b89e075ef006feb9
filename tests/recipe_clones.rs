//! A guest with disks, a network card and a second serial port: each clone has its own of everything that a host can
//! have only once, and the captured VM has its own image again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::accounting::{StandStill, assert_sums};
use crate::clone_disks::{Tmpfs, du};
use crate::support::guest::{
    CAPTURED_MAC, Qemu, beats_in_image, beats_on_disk, devices, free_port, heartbeats, make_disk, media,
    overlays, patiently, root_is_on_disk, told,
};
use crate::support::host;
use crate::support::mount::{TestMount, run};

/// What a host can have only once, as QEMU says it: name, UUID, VM generation, address of the network card.
fn identity(qmp: &mut Qmp) -> [String; 4] {
    let mut ask = |command: &str, field: &str| qmp.run(command, json!({})).unwrap()[field].to_string();
    let asked = [("query-name", "name"), ("query-uuid", "UUID"), ("query-vm-generation-id", "guid")]
        .map(|(c, f)| ask(c, f));
    let card = json!({"path": "/machine/peripheral/eth", "property": "mac"});
    let [name, uuid, generation] = asked;
    [name, uuid, generation, qmp.run("qom-get", card).unwrap().to_string()]
}

fn count_of(line: &str) -> u64 {
    line.split(' ').next().unwrap().parse().unwrap()
}

/// Heartbeats are on the disk from the first to this one, each once.
#[track_caller]
fn are_whole(beats: &[String], at_least: u64) {
    for (line, number) in beats.iter().zip(1..) {
        assert_eq!(count_of(line), number, "after {:?}", beats.get(number as usize - 2));
    }
    assert!(beats.len() as u64 >= at_least, "{} heartbeats, {at_least} were told", beats.len());
}

/// Clones whose folders lie in RAM; they are stopped before these go.
struct InMemory<'a>(&'a TestMount, Option<Tmpfs>);

impl Drop for InMemory<'_> {
    fn drop(&mut self) {
        self.0.stencil(&["stop", "--all"]);
        drop(self.1.take());
    }
}

/// What the guests have written is RAM that the figures have, to the byte.
fn disks_are_in_the_figures(world: &TestMount, clones: &[Value]) {
    // Two looks at a disk that is written to would differ.
    let still = StandStill::of(&world.json(&["ps"]));
    let density = world.json(&["density", "--audit"]);
    assert_sums(&density);
    let of = |clone: &Value| {
        let folder = Path::new(clone["dir"].as_str().unwrap());
        du(&["disk-root.qcow2", "disk-second.qcow2"].map(|name| folder.join(name)))
    };
    for clone in clones {
        let rows = density["clones"].as_array().unwrap();
        let row = rows.iter().find(|row| row["id"] == clone["id"]).unwrap();
        assert!(of(clone) > 256 << 10, "{}", of(clone));
        assert_eq!(row["disk_bytes"], of(clone), "{row:#}");
    }
    let totals = &density["totals"];
    assert_eq!(totals["disk_bytes"], clones.iter().map(of).sum::<u64>());
    drop(still);
    let parts = ["private_bytes", "page_table_bytes", "overhead_bytes", "disk_bytes"];
    let of_the_clones: u64 = parts.iter().map(|part| totals[part].as_u64().unwrap()).sum();
    assert_eq!(totals["bytes_per_further_clone"], of_the_clones / clones.len() as u64);
    // There is no baseline where a process of another scenario let nobody look into it.
    if density["audit"]["memory"].is_object() {
        assert_eq!(density["audit"]["memory"]["accounted_bytes"], of_the_clones);
    }
}

#[test]
fn soak_clones_write_to_their_disks_and_answer_at_the_same_time() {
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
    let own_identity = identity(&mut guest.qmp());
    let before = media(&mut guest.qmp());
    let captured = world.json(&["capture", guest.socket().to_str().unwrap(), "vm:1"]);
    println!("the VM stood still for {} s", captured["pause_seconds"]);
    assert_eq!((&captured["vm"], &captured["warnings"]), (&json!("running"), &json!([])));
    assert_eq!(media(&mut guest.qmp()), before, "the VM has its own images again");
    assert_eq!(overlays(dir), Vec::<PathBuf>::new());
    let names: Vec<_> = captured["files"].as_array().unwrap().iter().map(|f| f["name"].clone()).collect();
    assert_eq!(names, ["disk-cd", "disk-root", "disk-second", "initrd", "kernel", "memory", "state"]);
    let recipe = world.stencil(&["inspect", "--recipe", "vm:1"]).ok().out;
    assert!(!recipe.contains(dir.to_str().unwrap()) && !recipe.contains("52:54:00"), "{recipe}");

    // It goes on writing to them, and what it writes is not in the template.
    let now = guest.heartbeats().len();
    guest.wait_heartbeats(now + 3);
    let own = beats_on_disk(port).unwrap();
    are_whole(&own, now as u64);

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
    // As on most hosts: records and overlays lie in RAM.
    let in_memory = world.runtime_dir().join("clones");
    let _tmpfs = InMemory(&world, Some(Tmpfs::on(&in_memory)));
    // What the clones have open.
    let base = world.file(captured["digest"].as_str().unwrap(), "disk-root");
    let served = || blake3::hash(&fs::read(&base).unwrap()).to_hex().to_string();
    assert_eq!(served(), root_before);
    let number: usize = host::rounds(3, 6);
    let launched = world.json(&["clone", "vm:1", "-n", &number.to_string()]);
    println!("{number} guests were running after {} s", launched["ready_seconds"]);
    let listed = world.json(&["ps"]);
    let clones = listed["clones"].as_array().unwrap();
    assert_eq!(clones.len(), number);

    // All at the same time: on its own port each answers with what it has written to its own disk.
    std::thread::scope(|scope| {
        for clone in clones {
            scope.spawn(|| {
                let folder = Path::new(clone["dir"].as_str().unwrap());
                let port = clone["ports"]["80"].as_u64().unwrap() as u16;
                let first = patiently("an answer", Duration::from_secs(60), || beats_on_disk(port));
                let later = patiently("a longer answer", Duration::from_secs(60), || {
                    beats_on_disk(port).filter(|beats| beats.len() > first.len() + 2)
                });
                are_whole(&later, first.len() as u64 + 2);
                // It is this clone that answers: its serial port says the same.
                let beats = heartbeats(&folder.join("serial.log"));
                let last = later.last().unwrap();
                assert!(beats.iter().any(|b| last == &format!("{} {}", b.count, b.random)), "{last}");
                // The second serial port is a socket on which it talks.
                let talks = folder.join("serial-1.sock");
                root_is_on_disk(&talks);
                let beat = &told(&talks, "who");
                assert!(count_of(beat) >= count_of(last), "{beat} after {last}");
            });
        }
    });

    let logs = world.stencil(&["logs", clones[0]["id"].as_str().unwrap()]).ok().out;
    let socket = Path::new(clones[0]["dir"].as_str().unwrap()).join("serial-1.sock");
    assert!(logs.contains(&format!("UNIX-CONNECT:{}", socket.display())), "{logs}");

    // A guest goes on with the address in its device state, until it takes the one that its card was given.
    for clone in clones {
        let folder = Path::new(clone["dir"].as_str().unwrap());
        let mut qmp = Qmp::connect(&folder.join("qmp.sock")).unwrap();
        let card = json!({"path": "/machine/peripheral/eth", "property": "mac"});
        let given = qmp.run("qom-get", card).unwrap().as_str().unwrap().to_owned();
        let mut used = || qmp.run("query-rx-filter", json!({})).unwrap()[0]["main-mac"].clone();
        assert_eq!(used(), CAPTURED_MAC);
        told(&folder.join("serial-1.sock"), &format!("mac {given}"));
        patiently("another address", Duration::from_secs(60), || (used() == given).then_some(()));
        let port = clone["ports"]["80"].as_u64().unwrap() as u16;
        patiently("an answer from it", Duration::from_secs(60), || beats_on_disk(port));
    }

    // What a host can have only once is another one's nowhere.
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); 8];
    for clone in clones {
        let folder = Path::new(clone["dir"].as_str().unwrap());
        let mut qmp = Qmp::connect(&folder.join("qmp.sock")).unwrap();
        let [name, uuid, generation, mac] = identity(&mut qmp);
        let local = u8::from_str_radix(&mac[1..3], 16).unwrap();
        assert_eq!(local & 3, 2, "a MAC that is locally administered");
        let told = [
            name,
            uuid,
            generation,
            mac,
            clone["id"].to_string(),
            clone["ports"]["80"].to_string(),
            media(&mut qmp).to_string(),
            beats_on_disk(clone["ports"]["80"].as_u64().unwrap() as u16).unwrap().last().unwrap().clone(),
        ];
        for (all, one) in seen.iter_mut().zip(told) {
            all.insert(one);
        }
        for name in ["disk-root.qcow2", "disk-second.qcow2"] {
            let info = run("qemu-img", &["info", "-U", "--output=json", folder.join(name).to_str().unwrap()]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename-format"], "raw");
            let backing = info["backing-filename"].as_str().unwrap();
            assert!(backing.starts_with(world.mountpoint().to_str().unwrap()), "{backing}");
        }
    }
    assert!(seen.iter().all(|all| all.len() == number), "{seen:#?}");
    assert!(
        seen.iter().zip(&own_identity).all(|(all, own)| !all.contains(own)),
        "{own_identity:?} in {seen:#?}"
    );

    // While all of them write.
    let written =
        || clones.iter().map(|c| beats_on_disk(c["ports"]["80"].as_u64().unwrap() as u16).unwrap().len());
    let first: Vec<usize> = written().collect();
    patiently("more on all disks", Duration::from_secs(60), || {
        assert_eq!(served(), root_before, "no clone has written to the base image");
        written().zip(&first).all(|(now, first)| now > *first).then_some(())
    });

    let images: Vec<PathBuf> =
        clones.iter().map(|c| Path::new(c["dir"].as_str().unwrap()).join("disk-root.qcow2")).collect();
    images.iter().for_each(|image| drop(run("qemu-img", &["check", "-q", "-U", image.to_str().unwrap()])));
    disks_are_in_the_figures(&world, clones);
    world.stencil(&["stop", "--all"]).ok();
    assert_eq!(served(), root_before, "no clone has written to the base image");
    assert!(images.iter().all(|image| !image.exists()), "a clone's disk goes with it");
    world.stencil(&["verify", "vm:1"]).ok();

    // The VM's own image: sound, with everything that it has written.
    let told = guest.heartbeats().last().unwrap().count;
    guest.run("quit");
    patiently("end of QEMU", Duration::from_secs(10), || guest.has_ended().then_some(()));
    are_whole(&beats_in_image(&disk, dir), told - 1);
}

#[test]
fn soak_a_killed_capture_gives_the_vm_its_disk_back() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = make_disk(world.dir(), 24 << 20);
    let mut guest = Qemu::boot_with(world.dir(), &devices(world.dir(), &disk, free_port()));
    let before = media(&mut guest.qmp());
    let rounds = host::rounds(8, 50);
    let (mut whole, mut in_the_middle) = (0, 0);
    for round in 0..rounds {
        let mut command = world.command();
        command.arg("capture").arg(guest.socket()).arg(format!("vm:k{round}"));
        // Its helper goes on talking here.
        let log =
            fs::File::options().create(true).append(true).open(world.dir().join("captures.log")).unwrap();
        let mut capture = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        // Half of them as soon as the disk is frozen and a moment later, the others anywhere.
        if round % 2 == 0 {
            for _ in 0..400 {
                if !overlays(world.dir()).is_empty() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        std::thread::sleep(Duration::from_millis(round * 97 % 400));
        in_the_middle += usize::from(!overlays(world.dir()).is_empty());
        let _ = kill_process(Pid::from_raw(capture.id() as i32).unwrap(), Signal::KILL);
        whole += usize::from(capture.wait().unwrap().success());
        let end = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            // Not too often: the helper wants to talk to QEMU as well, which speaks with one at a time.
            std::thread::sleep(Duration::from_millis(50));
            let Ok(mut qmp) = Qmp::connect(&guest.socket()) else { continue };
            let (status, own, left) = (qmp.status().unwrap(), media(&mut qmp), overlays(world.dir()));
            if status == "running" && own == before && left.is_empty() {
                break;
            }
            let log = fs::read_to_string(world.dir().join("captures.log")).unwrap();
            assert!(std::time::Instant::now() < end, "round {round}: {status}, {own}, {left:?}: {log}");
        }
        let beats = guest.heartbeats().len();
        guest.wait_heartbeats(beats + 1);
    }
    println!(
        "{rounds} captures: {in_the_middle} killed while the disk was frozen, {whole} faster than the signal"
    );
    assert!(in_the_middle > 0);
    world.json(&["capture", guest.socket().to_str().unwrap(), "vm:whole"]);
    let told = guest.heartbeats().last().unwrap().count;
    guest.run("quit");
    patiently("end of QEMU", Duration::from_secs(10), || guest.has_ended().then_some(()));
    are_whole(&beats_in_image(&disk, world.dir()), told - 1);
}

#[test]
fn soak_a_vm_that_dies_while_its_disk_is_read_loses_nothing() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let disk = make_disk(world.dir(), 24 << 20);
    let frozen = || overlays(world.dir()).pop();
    let grown = || fs::metadata(frozen()?).is_ok_and(|about| about.len() > 256 << 10).then_some(());
    for &with_capture in host::rounds(&[true][..], &[false, true]) {
        let mut guest = Qemu::boot_with(world.dir(), &devices(world.dir(), &disk, free_port()));
        // The capture stands still while it reads the disk, until the guest has written to the overlay. In its first moments
        // the guest stands still too: then the capture goes on a little.
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
                                // It goes on: soon it has written enough.
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
            .expect("a capture that reads the disk when it is looked at");
        let beats = guest.heartbeats().len();
        guest.wait_heartbeats(beats + 2);
        guest.kill();
        let told = guest.heartbeats().last().unwrap().count;
        let pid = Pid::from_raw(capture.id() as i32).unwrap();
        kill_process(pid, if with_capture { Signal::KILL } else { Signal::CONT }).unwrap();
        let status = capture.wait().unwrap();
        patiently("the overlay's end", Duration::from_secs(30), || {
            overlays(world.dir()).is_empty().then_some(())
        });
        println!("capture ended with {status}, {told} heartbeats");
        // The next guest boots from the same image and counts anew.
        let beats = beats_in_image(&disk, world.dir());
        let begin = beats.iter().rposition(|line| count_of(line) == 1).unwrap();
        are_whole(&beats[begin..], told - 1);
        fs::remove_file(world.dir().join("serial")).unwrap();
    }
}
