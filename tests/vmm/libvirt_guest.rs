//! A VM started by libvirt, with the devices that libvirt adds to each VM, is captured; its clones run beside it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::vm::guest::{
    CAPTURED_MAC, beats_in_image, heartbeats, linux, make_disk, media, overlays, patiently,
};
use crate::support::vm::libvirt::Domain;

/// Lines of the domain XML in docs/how-to/libvirt.md.
fn documented() -> impl Iterator<Item = &'static str> {
    let text = include_str!("../../docs/how-to/libvirt.md");
    let block = text.split("```xml\n").nth(1).unwrap().split("```").next().unwrap();
    block.lines().map(str::trim)
}

fn domain(dir: &Path, disk: &Path) -> String {
    let [kernel, initramfs, append] = linux();
    // libvirt changes the owner of files that are passed to QEMU, so the domain gets copies.
    for (from, to) in [(kernel, "vmlinuz"), (initramfs, "initramfs")] {
        fs::copy(from, dir.join(to)).unwrap();
    }
    let firmware = ["seabios", "qemu"].map(|place| format!("/usr/share/{place}/bios-256k.bin"));
    fs::copy(firmware.iter().find(|path| Path::new(path).exists()).unwrap(), dir.join("code.fd")).unwrap();
    fs::write(dir.join("vars.fd"), vec![0; 128 << 10]).unwrap();
    fs::write(dir.join("cd.iso"), vec![6; 1 << 20]).unwrap();
    let (disk, dir) = (disk.display(), dir.display());
    format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <uuid>0f8ffa3c-6d0f-4d5c-b4e4-3f0a8b1f5a51</uuid>
  <genid/>
  <memory unit='MiB'>256</memory>
  <memoryBacking>
    <source type='file'/>
    <access mode='shared'/>
  </memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>{dir}/code.fd</loader>
    <nvram>{dir}/vars.fd</nvram>
    <kernel>{dir}/vmlinuz</kernel>
    <initrd>{dir}/initramfs</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <cpu mode='maximum'/>
  <clock offset='utc'>
    <timer name='rtc' tickpolicy='catchup'/>
    <timer name='pit' tickpolicy='delay'/>
    <timer name='hpet' present='no'/>
  </clock>
  <pm>
    <suspend-to-mem enabled='no'/>
    <suspend-to-disk enabled='no'/>
  </pm>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='{dir}/cd.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <controller type='usb' model='qemu-xhci' ports='15'/>
    <interface type='user'>
      <mac address='{CAPTURED_MAC}'/>
      <model type='virtio'/>
    </interface>
    <serial type='file'>
      <source path='{dir}/serial'/>
    </serial>
    <channel type='unix'>
      <source mode='bind' path='{dir}/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <input type='tablet' bus='usb'/>
    <graphics type='vnc' socket='{dir}/vnc'/>
    <video>
      <model type='virtio'/>
    </video>
    <watchdog model='i6300esb' action='reset'/>
    <rng model='virtio'>
      <backend model='random'>/dev/urandom</backend>
    </rng>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{dir}/web.qmp,server=on,wait=off'/>
  </qemu:commandline>
</domain>
"
    )
}

#[test]
fn captures_a_libvirt_domain_and_runs_its_clones() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let dir = world.dir();
    let disk = make_disk(dir, 1 << 20);
    let xml = domain(dir, &disk);
    let comparable = xml.replace(dir.to_str().unwrap(), "/var/lib/libvirt/qemu");
    for line in documented() {
        assert!(
            line == "…" || comparable.lines().any(|l| l.trim() == line),
            "the domain lacks the documented line: {line}"
        );
    }
    fs::write(dir.join("domain.xml"), &xml).unwrap();
    run("virt-xml-validate", &[dir.join("domain.xml").to_str().unwrap(), "domain"]);

    let running = Domain::start(&world, &xml);
    let beats_of_vm = || heartbeats(&dir.join("serial"));
    patiently("heartbeats", Duration::from_secs(120), || {
        assert!(running.is_alive(), "{}", running.said(&world));
        (beats_of_vm().len() >= 3).then_some(())
    });
    let socket = dir.join("web.qmp");
    let mut qmp = Qmp::connect(&socket).unwrap();
    let before = media(&mut qmp);
    let generation = |qmp: &mut Qmp| qmp.run("query-vm-generation-id", json!({})).unwrap()["guid"].clone();
    let generation_of_vm = generation(&mut qmp);
    drop(qmp);
    let captured = world.json(&["capture", socket.to_str().unwrap(), "web:1"]);
    assert_eq!((&captured["vm"], &captured["warnings"]), (&json!("running"), &json!([])));
    let count = beats_of_vm().len();
    patiently("more heartbeats", Duration::from_secs(60), || {
        (beats_of_vm().len() >= count + 3).then_some(())
    });
    assert_eq!(
        media(&mut Qmp::connect(&socket).unwrap()),
        before,
        "the VM must use its original images again"
    );
    assert!(overlays(dir).is_empty());

    world.mount(&[]).ok();
    world.json(&["clone", "web:1", "-n", "2"]);
    let listed = world.json(&["ps"]);
    let clones = listed["clones"].as_array().unwrap();
    assert_eq!(clones.len(), 2);
    let mut generations = vec![generation_of_vm];
    for clone in clones {
        let directory = Path::new(clone["dir"].as_str().unwrap());
        let beats = || heartbeats(&directory.join("chardev-charserial0.log"));
        patiently("heartbeats of a clone", Duration::from_secs(60), || (beats().len() >= 3).then_some(()));
        assert!(
            beats()[0].count > 1 && beats()[0].count as usize <= count + 1,
            "the clone must continue from the captured state: {:?}",
            beats()
        );
        assert!(
            directory.join("charchannel0.sock").exists(),
            "the clone must have a socket for the guest agent"
        );
        let mut qmp = Qmp::connect(&directory.join("qmp.sock")).unwrap();
        generations.push(generation(&mut qmp));
        let disks = media(&mut qmp);
        for name in ["disk-libvirt-2-format.qcow2", "disk-libvirt-pflash1-format.qcow2"] {
            assert!(disks.to_string().contains(directory.join(name).to_str().unwrap()), "{disks}");
        }
        assert!(!disks.to_string().contains(disk.to_str().unwrap()), "{disks}");
    }
    generations.sort_by_key(Value::to_string);
    generations.dedup();
    assert_eq!(generations.len(), 3, "the VM and its clones must have different generation IDs");
    let density = world.json(&["density"]);
    for clone in density["clones"].as_array().unwrap() {
        let maps = clone["maps"].as_array().unwrap();
        assert!(maps.iter().any(|map| map["file"] == "memory"), "the clone must map the template: {clone}");
    }
    world.stencil(&["stop", "--all"]).ok();

    // libvirt destroys the VM as usual, and the disk image is consistent.
    let reported = beats_of_vm().last().unwrap().count;
    drop(running);
    let beats = beats_in_image(&disk, dir);
    for (line, number) in beats.iter().zip(1_u64..) {
        assert_eq!(line.split(' ').next(), Some(number.to_string().as_str()));
    }
    assert!(
        beats.len() as u64 >= reported - 1,
        "{} heartbeats on the disk, {reported} on the serial port",
        beats.len()
    );
}

#[test]
fn captures_minimal_domains_with_the_devices_libvirt_adds() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    let socket = world.dir().join("qmp");
    let usb = [
        "<controller type='usb' index='0' model='ich9-ehci1'/>",
        "<controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/></controller>",
        "<controller type='usb' index='0' model='ich9-uhci2'><master startport='2'/></controller>",
        "<controller type='usb' index='0' model='ich9-uhci3'><master startport='4'/></controller>",
        "<video><model type='bochs'/></video>",
    ];
    for (machine, more, device) in
        [("pc", String::new(), "cirrus-vga"), ("q35", usb.concat(), "bochs-display")]
    {
        let xml = format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>few-{machine}</name>
  <memory unit='MiB'>64</memory>
  <memoryBacking>
    <source type='file'/>
    <access mode='shared'/>
  </memoryBacking>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
  </os>
  <features>
    <acpi/>
  </features>
  <devices>
    {more}
    <interface type='user'/>
    <serial type='pty'/>
    <graphics type='vnc' socket='{}'/>
    <input type='tablet' bus='usb'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{},server=on,wait=off'/>
  </qemu:commandline>
</domain>
",
            world.dir().join("vnc").display(),
            socket.display()
        );
        let running = Domain::start(&world, &xml);
        let tag = format!("few:{machine}");
        patiently("a running VM", Duration::from_secs(60), || {
            assert!(running.is_alive(), "{}", running.said(&world));
            (Qmp::connect(&socket).ok()?.status().ok()? == "running").then_some(())
        });
        world.json(&["capture", socket.to_str().unwrap(), &tag]);
        drop(running);
        let recipe = world.stencil(&["inspect", "--recipe", &tag]).ok().out;
        assert!(recipe.contains(&format!("\"{device},")), "{recipe}");
    }
    world.mount(&[]).ok();
    for tag in ["few:pc", "few:q35"] {
        assert_eq!(world.json(&["clone", tag])["clones"].as_array().unwrap().len(), 1);
    }
}
