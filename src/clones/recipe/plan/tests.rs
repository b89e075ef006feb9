use super::*;
use crate::clones::recipe::LiveDisk;

mod libvirt;

const GUEST: &str = "-M q35,memory-backend=ram0 -accel tcg -m 256M -nodefaults -display none -serial file:/tmp/s \
    -object memory-backend-file,id=ram0,size=256M,mem-path=/tmp/ram,share=on,prealloc=on \
    -qmp unix:/tmp/q,server=on,wait=off -device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 \
    -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
    -kernel /boot/k -initrd /boot/i -append console=ttyS0 -daemonize -pidfile /tmp/p";

fn words(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn planned(extra: &str) -> Result<Plan> {
    let facts = Facts { machine_type: Some("pc-q35-10.0".into()), disks: vec![] };
    plan(&words(&format!("{GUEST} {extra}")), &facts)
}

#[test]
fn converts_a_plain_guest() {
    let plan = planned("").unwrap();
    let line = plan.argv.join(" ");
    assert!(line.starts_with("-machine pc-q35-10.0,memory-backend=ram0 -accel tcg -m 256M"), "{line}");
    assert!(line.contains(
        "-object memory-backend-file,id=ram0,size=256M,mem-path={memory},share=off,readonly=on,rom=off,align=2M "
    ));
    assert!(line.contains("-device vmgenid,guid=auto"));
    assert!(line.contains("-serial file:{dir}/serial.log"));
    assert!(line.contains("-kernel {file:kernel} -initrd {file:initrd}"));
    assert!(line.contains(" -uuid {uuid} ") && line.contains(" -parallel none "), "{line}");
    assert!(line.ends_with("-mon chardev=stencil-qmp,mode=control -incoming defer"));
    for gone in ["/tmp/", "daemonize", "pidfile", " -qmp ", "324e"] {
        assert!(!line.contains(gone), "{gone} in {line}");
    }
    assert_eq!(plan.ram, [Ram { id: "ram0".into(), file: "memory".into(), mem_path: "/tmp/ram".into() }]);
    assert_eq!(plan.blobs.len(), 2);
    assert_eq!(plan.warnings.len(), 1, "{:?}", plan.warnings);
}

#[test]
fn refuses_unsupported_options_by_name() {
    for (extra, name) in [
        ("-drive file=/d.img", "-drive file=/d.img: a disk whose image is no longer inserted"),
        ("/d.img", "-hda /d.img: a disk whose image is no longer inserted"),
        ("-netdev tap,id=n0,script=no -device virtio-net-pci,netdev=n0", "-netdev tap,id=n0,script=no"),
        (
            "-device vhost-user-blk-pci,chardev=c,id=vu",
            "device vhost-user-blk-pci (vu): its back end is a host process",
        ),
        ("-device virtio-net-pci,netdev=n0,romfile=/x,id=eth", "device virtio-net-pci (eth) with romfile=/x"),
        ("-serial /dev/ttyS0", "-serial /dev/ttyS0"),
        ("-chardev serial,id=c,path=/dev/ttyS0 -device isa-serial,chardev=c", "-chardev serial,id=c"),
        ("-append {id}", "{id} would be taken for a placeholder"),
        ("-fsdev local,id=f,path=/srv,security_model=none", "a shared directory"),
        ("-tpmdev emulator,id=t,chardev=c", "-tpmdev"),
        ("-device {\"driver\":\"vfio-pci\",\"host\":\"0:1\"}", "device vfio-pci"),
        ("-object tls-creds-psk,id=t", "object tls-creds-psk (t)"),
        ("-machine memory-encryption=sev0", "-machine memory-encryption=sev0"),
        ("-icount shift=1,rr=record,rrfile=/r", "-icount shift=1,rr=record,rrfile=/r: rr= names a host file"),
        ("-boot order=c,splash=/s.jpg", "-boot order=c,splash=/s.jpg: splash= names a host file"),
        ("-frobnicate", "-frobnicate"),
    ] {
        let error = planned(extra).unwrap_err();
        assert!(error.to_string().contains(name), "{extra}: {error}");
    }
    let all = planned("-frobnicate -tpmdev emulator,id=t -netdev vde,id=v").unwrap_err().to_string();
    assert!(all.contains("-frobnicate") && all.contains("-tpmdev") && all.contains("vde"), "{all}");
}

#[test]
fn replaces_unique_host_resources_by_placeholders() {
    let live = |device: &str, node: &str, path: &str, format: &str, read_only| LiveDisk {
        device: device.into(),
        qdev: String::new(),
        node: node.into(),
        read_only,
        image: super::super::Image { path: path.into(), format: format.into(), size: 1 << 20, backing: None },
        problem: None,
    };
    let disks = vec![
        live("virtio0", "#block1", "/d,1.qcow2", "qcow2", false),
        live("ide2-cd0", "#block2", "/cd.iso", "raw", true),
        live("", "root", "/r.raw", "raw", false),
    ];
    let facts = Facts { machine_type: None, disks };
    let extra = "-drive file=/d,,1.qcow2,if=virtio,cache=none,aio=native -cdrom /cd.iso \
        -blockdev driver=file,node-name=f,filename=/r.raw -blockdev driver=raw,node-name=root,file=f \
        -device virtio-blk-pci,drive=root -netdev user,id=n0,hostfwd=tcp::2222-:22 \
        -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01 -nic user,model=e1000 \
        -uuid 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 -device vhost-vsock-pci,guest-cid=3 \
        -serial unix:/tmp/two,server=on,wait=off -chardev pty,id=p0 -device isa-serial,chardev=p0";
    let plan = plan(&words(&format!("{GUEST} {extra}")), &facts).unwrap();
    let line = plan.argv.join(" ");
    for words in [
        "-drive file={disk:virtio0},if=virtio,format=qcow2 ",
        "-drive index=2,media=cdrom,file={file:disk-ide2-cd0},format=raw ",
        "-blockdev driver=qcow2,node-name=root,read-only=off,file.driver=file,file.filename={disk:root}",
        "-netdev user,id=n0,hostfwd=tcp::{port:22}-:22 ",
        "-device virtio-net-pci,netdev=n0,mac={mac} ",
        "-nic user,model=e1000,mac={mac:1} ",
        "-device vhost-vsock-pci,guest-cid={cid} ",
        "-serial file:{dir}/serial.log ",
        "-serial unix:{dir}/serial-1.sock,server=on,wait=off ",
        "-chardev socket,id=p0,path={dir}/p0.sock,server=on,wait=off ",
        "-uuid {uuid} ",
    ] {
        assert!(line.contains(words), "no {words} in {line}");
    }
    assert!(!line.contains("324e6eaf") && !line.contains("/tmp/two") && !line.contains("52:54"), "{line}");
    assert_eq!(plan.disks.len(), 3);
    // -drive if=virtio creates a device; the cards of -nic belong to the board.
    assert_eq!(plan.devices, 7);
    let unplugged = Facts { disks: vec![live("late", "l", "/l", "raw", false)], ..Facts::default() };
    let error = super::plan(&words(GUEST), &unplugged).unwrap_err().to_string();
    assert!(error.contains("disk late, which is not on the command line"), "{error}");
}

#[test]
fn makes_implicit_defaults_explicit() {
    let plan = plan(&words(&GUEST.replace("-nodefaults", "")), &Facts::default()).unwrap();
    let line = plan.argv.join(" ");
    assert!(line.contains("-nic user,mac={mac} ") && line.contains("-parallel null "), "{line}");
}

#[test]
fn refuses_private_ram_with_the_options_to_add() {
    for (line, text) in [
        (
            "-M q35 -m 512M -nodefaults",
            "-machine q35,memory-backend=ram0 -object memory-backend-file,id=ram0,size=512M,mem-path=FILE,share=on",
        ),
        (
            "-object memory-backend-ram,id=r,size=1G",
            "-object memory-backend-file,id=r,size=1G,mem-path=FILE,share=on",
        ),
        (
            "-object memory-backend-file,id=r,size=1G,mem-path=/f",
            "add share=on to -object memory-backend-file,id=r,",
        ),
    ] {
        let error = plan(&words(line), &Facts::default()).unwrap_err();
        assert!(error.hint_text().unwrap().contains(text), "{line}: {error:?}");
    }
}

#[test]
fn drops_monitors_and_turns_serial_chardevs_into_files() {
    let plan = planned(
        "-chardev socket,id=m,path=/x,server=on -mon chardev=m,mode=control \
         -chardev stdio,id=con -device isa-serial,chardev=con",
    )
    .unwrap();
    let line = plan.argv.join(" ");
    assert!(line.contains("-device isa-serial,chardev=con"));
    assert!(line.contains("-chardev file,id=con,path={dir}/chardev-con.log"));
    assert!(!line.contains("stdio") && !line.contains("/x"), "{line}");
}

#[test]
fn host_paths_become_template_files_or_warnings() {
    let plan =
        planned("-smbios type=11,value=a,path=/s1,path=/s2 -icount shift=1 -boot menu=on -L /firmware")
            .unwrap();
    let line = plan.argv.join(" ");
    assert!(line.contains("-smbios type=11,value=a,path={file:smbios-2},path={file:smbios-3} "), "{line}");
    let paths: Vec<_> = plan.blobs.iter().skip(2).map(|blob| blob.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["/s1", "/s2"]);
    assert!(plan.warnings[0].contains("/firmware"), "{:?}", plan.warnings);
}

#[test]
fn resolves_short_device_names() {
    let text = "-device ahci,id=a -device virtio-net,netdev=n0 -netdev user,id=n0 -device virtio-serial";
    let plan = planned(&format!("{text} -device virtio-rng,rng=rng0"));
    let line = plan.unwrap().argv.join(" ");
    for words in
        ["ich9-ahci,id=a ", "virtio-net-pci,netdev=n0,mac={mac} ", "virtio-serial-pci ", "virtio-rng-pci,"]
    {
        assert!(line.contains(&format!("-device {words}")), "no {words} in {line}");
    }
    let error = planned("-device virtio-balloon").unwrap_err().to_string();
    assert!(error.contains("device virtio-balloon-pci: returns template pages"), "{error}");
}

#[test]
fn warns_about_shared_networks() {
    for (text, kept) in [
        ("-netdev bridge,id=n0,br=br7 -device e1000,netdev=n0", "-netdev bridge,id=n0,br=br7 "),
        (
            "-nic tap,ifname=t0,script=/etc/up,downscript=no,mac=52:54:00:00:00:01",
            "-nic tap,script=/etc/up,downscript=no,mac={mac},id=stencil-net-1 ",
        ),
    ] {
        let plan = planned(text).unwrap();
        assert!(plan.argv.join(" ").contains(kept), "{:?}", plan.argv);
        assert!(
            plan.warnings.iter().any(|w| w.contains("MAC and IP address")),
            "{text}: {:?}",
            plan.warnings
        );
        let recipe = crate::clones::recipe::Recipe::qemu("qemu".into(), String::new(), plan.argv);
        assert_eq!(recipe.shared_networks(), [if text.contains("bridge") { "n0" } else { "stencil-net-1" }]);
    }
}

#[test]
fn second_ram_backend_becomes_a_second_file() {
    let plan = planned("-object memory-backend-file,id=ram1,size=1M,mem-path=/tmp/b,share=on").unwrap();
    assert_eq!(plan.ram[1].file, "memory-ram1");
    assert!(plan.argv.join(" ").contains("mem-path={file:memory-ram1},"));
}
