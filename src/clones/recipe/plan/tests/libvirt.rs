//! A command line that libvirt 9.0 generated for a domain, with shortened paths.

use super::super::super::Image;
use super::*;

const LINE: &str = r#"-name guest=web,debug-threads=on
-S
-object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/lib/qemu/domain-1-web/master-key.aes"}
-blockdev {"driver":"file","filename":"/usr/share/seabios/bios-256k.bin","node-name":"libvirt-pflash0-storage","auto-read-only":true,"discard":"unmap"}
-blockdev {"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}
-blockdev {"driver":"file","filename":"/d/vars.fd","node-name":"libvirt-pflash1-storage","auto-read-only":true,"discard":"unmap"}
-blockdev {"node-name":"libvirt-pflash1-format","read-only":false,"driver":"raw","file":"libvirt-pflash1-storage"}
-machine pc-q35-10.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format,hpet=off
-accel tcg
-cpu max
-m 256
-object {"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/lib/qemu/ram/1-web/pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":268435456}
-overcommit mem-lock=off
-smp 1,sockets=1,cores=1,threads=1
-uuid 0f8ffa3c-6d0f-4d5c-b4e4-3f0a8b1f5a51
-device {"driver":"vmgenid","guid":"a4c5d8c6-1d37-4b7d-b60f-1f382f5311bc","id":"vmgenid0"}
-no-user-config
-nodefaults
-chardev socket,id=charmonitor,fd=9,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control
-rtc base=utc,driftfix=slew
-global kvm-pit.lost_tick_policy=delay
-no-shutdown
-global ICH9-LPC.disable_s3=1
-global ICH9-LPC.disable_s4=1
-boot strict=on
-kernel /boot/vmlinuz
-initrd /boot/initramfs.gz
-append console=ttyS0
-device {"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}
-device {"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}
-device {"driver":"pcie-root-port","port":18,"chassis":3,"id":"pci.3","bus":"pcie.0","addr":"0x2.0x2"}
-device {"driver":"pcie-root-port","port":19,"chassis":4,"id":"pci.4","bus":"pcie.0","addr":"0x2.0x3"}
-device {"driver":"pcie-root-port","port":20,"chassis":5,"id":"pci.5","bus":"pcie.0","addr":"0x2.0x4"}
-device {"driver":"pcie-root-port","port":21,"chassis":6,"id":"pci.6","bus":"pcie.0","addr":"0x2.0x5"}
-device {"driver":"pcie-pci-bridge","id":"pci.7","bus":"pci.1","addr":"0x0"}
-device {"driver":"pcie-root-port","port":22,"chassis":8,"id":"pci.8","bus":"pcie.0","addr":"0x2.0x6"}
-device {"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pci.3","addr":"0x0"}
-device {"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pci.4","addr":"0x0"}
-blockdev {"driver":"file","filename":"/d/disk.qcow2","node-name":"libvirt-2-storage","auto-read-only":true,"discard":"unmap"}
-blockdev {"node-name":"libvirt-2-format","read-only":false,"discard":"unmap","driver":"qcow2","file":"libvirt-2-storage"}
-device {"driver":"virtio-blk-pci","bus":"pci.5","addr":"0x0","drive":"libvirt-2-format","id":"virtio-disk0","bootindex":1}
-blockdev {"driver":"file","filename":"/d/cd.iso","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}
-blockdev {"node-name":"libvirt-1-format","read-only":true,"driver":"raw","file":"libvirt-1-storage"}
-device {"driver":"ide-cd","bus":"ide.0","drive":"libvirt-1-format","id":"sata0-0-0"}
-netdev {"type":"user","id":"hostnet0"}
-device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:12:34:57","bus":"pci.2","addr":"0x0"}
-add-fd set=0,fd=7,opaque=serial0-source
-chardev file,id=charserial0,path=/dev/fdset/0,append=on
-device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}
-chardev socket,id=charchannel0,fd=8,server=on,wait=off
-device {"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}
-device {"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"}
-audiodev {"id":"audio1","driver":"none"}
-vnc 127.0.0.1:0,audiodev=audio1
-device {"driver":"virtio-vga","id":"video0","max_outputs":1,"bus":"pcie.0","addr":"0x1"}
-device {"driver":"i6300esb","id":"watchdog0","bus":"pci.7","addr":"0x1"}
-watchdog-action reset
-object {"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}
-device {"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pci.6","addr":"0x0"}
-qmp unix:/d/qmp,server=on,wait=off
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-msg timestamp=on"#;

fn disk(node: &str, path: &str, format: &str, read_only: bool) -> LiveDisk {
    let image = Image { path: path.into(), format: format.into(), size: 1 << 20, backing: None };
    LiveDisk {
        device: String::new(),
        qdev: String::new(),
        node: node.into(),
        read_only,
        image,
        problem: None,
    }
}

fn planned(line: &str) -> Result<Plan> {
    let disks = vec![
        disk("libvirt-2-format", "/d/disk.qcow2", "qcow2", false),
        disk("libvirt-1-format", "/d/cd.iso", "raw", true),
        disk("libvirt-pflash0-format", "/usr/share/seabios/bios-256k.bin", "raw", true),
        disk("libvirt-pflash1-format", "/d/vars.fd", "raw", false),
    ];
    plan(&words(line), &Facts { machine_type: Some("pc-q35-10.0".into()), disks })
}

#[test]
fn converts_a_libvirt_domain() {
    let plan = planned(LINE).unwrap();
    let line = plan.argv.join(" ");
    for words in [
        "-machine pc-q35-10.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,pflash0=libvirt-pflash0-format,\
         pflash1=libvirt-pflash1-format,hpet=off ",
        "-object memory-backend-file,id=pc.ram,mem-path={memory},share=off,x-use-canonical-path-for-ramblock-id=off,\
         size=268435456,readonly=on,rom=off,align=2M ",
        "-device vmgenid,guid=auto,id=vmgenid0 ",
        "-netdev user,id=hostnet0 -device virtio-net-pci,netdev=hostnet0,id=net0,mac={mac},",
        "-audiodev none,id=audio1 ",
        "-watchdog-action reset ",
        "file.filename={disk:libvirt-2-format},discard=unmap ",
        "file.filename={disk:libvirt-pflash1-format} ",
        "file.filename={file:disk-libvirt-pflash0-format} ",
        "-chardev file,id=charserial0,path={dir}/chardev-charserial0.log ",
        "-chardev socket,id=charchannel0,path={dir}/charchannel0.sock,server=on,wait=off ",
    ] {
        assert!(line.contains(words), "no {words} in {line}");
    }
    for gone in
        ["masterKey0", "charmonitor", "fdset", "add-fd", "fd=", "-vnc", " -S ", "0f8ffa3c", "/d/", "52:54"]
    {
        assert!(!line.contains(gone), "{gone} in {line}");
    }
    assert_eq!(plan.warnings, Vec::<String>::new());
}

#[test]
fn advice_names_libvirt_elements() {
    let user = r#"{"type":"user","id":"hostnet0"}"#;
    let tap = r#"{"type":"tap","fd":"35","vhost":true,"vhostfd":"37","id":"hostnet0"}"#;
    let balloon = r#"-device {"driver":"virtio-balloon-pci","id":"balloon0"} -device {"driver":"vmgenid","#;
    let spice = r#"-audiodev {"id":"audio1","driver":"spice"} -device {"driver":"qxl-vga","id":"v"}"#;
    let memory = r#""qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/lib/qemu/ram/1-web/pc.ram""#;
    for (from, to, words, remedy) in [
        (
            user,
            tap,
            "no script that sets up a device for each clone,fd=35,vhostfd=37",
            "<interface type='user'/>",
        ),
        ("mem-lock=off", "mem-lock=on", "would copy all RAM of the template", "no <locked/>"),
        (
            r#"-device {"driver":"vmgenid","#,
            balloon,
            "virtio-balloon-pci (balloon0)",
            "<memballoon model='none'/>",
        ),
        (
            r#"-audiodev {"id":"audio1","driver":"none"}"#,
            spice,
            "\"driver\":\"spice\"}: a host resource",
            "<graphics type='vnc'/>",
        ),
        (
            r#""p2":15"#,
            r#""x":"masterKey0""#,
            "object secret (masterKey0), used by qemu-xhci,x=masterKey0",
            "without them",
        ),
        (memory, r#""qom-type":"memory-backend-memfd","id":"pc.ram""#, "RAM of this VM", "<memoryBacking>"),
    ] {
        assert!(LINE.contains(from), "{from}");
        let error = planned(&LINE.replacen(from, to, 1)).unwrap_err();
        assert!(error.to_string().contains(words), "{to}: {error}");
        let hint = error.hint_text().unwrap();
        assert!(hint.contains("libvirt") && hint.contains(remedy), "{to}: {hint}");
    }
}

#[test]
fn drops_the_vsock_descriptor() {
    let more = r#"-device {"driver":"vhost-vsock-pci","id":"vsock0","guest-cid":3,"vhostfd":"28"}"#;
    let line = planned(&format!("{LINE} {more}")).unwrap().argv.join(" ");
    assert!(line.contains("-device vhost-vsock-pci,id=vsock0,guest-cid={cid} "), "{line}");
}
