//! What becomes of each option and device of a QEMU when its command line becomes one of clones.

use super::props::Props;

/// What happens to an option of QEMU's.
pub enum Rule {
    /// Kept; true: with a value.
    Keep(bool),
    /// Left out, or replaced at the end; true: with a value.
    Drop(bool),
    /// Its type is pinned.
    Machine,
    /// RAM backends become templates.
    Object,
    /// Only devices that need nothing of the host.
    Device,
    /// Those of monitors go, others become files.
    Chardev,
    /// Becomes a file.
    Serial,
    /// Goes, and its chardev with it.
    Mon,
    /// Its value is a file that goes into the template under the option's name.
    File,
    /// The same, where it is a path; else kept.
    FileIfPath,
    /// A network.
    Network,
    /// Kept where it is nothing of the host's.
    Audio,
    /// A disk in full.
    Drive,
    /// A disk by its file alone.
    Disk,
    /// A block node.
    Blockdev,
    /// Kept; what identifies the machine is each clone's own, a file goes into the template.
    Firmware,
    /// A parallel port, that goes nowhere.
    Parallel,
    /// Refused as what it names.
    Refuse(&'static str),
    /// Refused by name.
    Unknown,
}

/// Why clones cannot have this value of an option that is kept otherwise.
pub fn unfit(option: &str, value: &str) -> Option<String> {
    let props = Props::parse(value, "")?;
    // Files of the host: one that QEMU writes, and one that only firmware shows.
    let of_host: &[&str] = match option {
        "icount" => &["rr", "rrfile"],
        "boot" => &["splash"],
        _ => &[],
    };
    let key = of_host.iter().find(|key| props.get(key).is_some());
    key.map(|key| format!("{key}= names a file of the host")).or_else(|| locks_memory(option, value))
}

/// `mlockall(2)` populates a private mapping by write faults, so that nothing of the template is shared. With `on-fault`
/// only what the guest touches is locked, and a page that is read stays the template's.
pub fn locks_memory(option: &str, value: &str) -> Option<String> {
    let props = Props::parse(value, "").filter(|_| option == "overcommit")?;
    let locks = !matches!(props.get("mem-lock")?, "off" | "no" | "false" | "n" | "on-fault");
    locks.then(|| "each clone would copy all RAM of its template to lock it".to_owned())
}

/// The rule of an option, without its dashes.
pub fn rule(option: &str) -> Rule {
    match option {
        "enable-kvm" | "nodefaults" | "no-user-config" | "nographic" | "no-reboot" | "no-shutdown"
        | "no-acpi" | "no-hpet" | "no-fd-bootchk" | "usb" => Rule::Keep(false),
        "accel" | "cpu" | "smp" | "m" | "overcommit" | "numa" | "boot" | "vga" | "k" | "rtc" | "icount"
        | "global" | "L" | "append" | "action" | "watchdog-action" | "msg" | "compat" | "sandbox" => {
            Rule::Keep(true)
        }
        "daemonize" | "S" | "s" => Rule::Drop(false),
        "pidfile" | "name" | "uuid" | "D" | "d" | "trace" | "monitor" | "qmp" | "qmp-pretty" | "incoming"
        | "display" | "vnc" | "gdb" | "add-fd" => Rule::Drop(true),
        "M" | "machine" => Rule::Machine,
        "object" => Rule::Object,
        "device" => Rule::Device,
        "chardev" => Rule::Chardev,
        "serial" => Rule::Serial,
        "mon" => Rule::Mon,
        "kernel" | "initrd" => Rule::File,
        "bios" => Rule::FileIfPath,
        "smbios" | "fw_cfg" => Rule::Firmware,
        "parallel" => Rule::Parallel,
        "drive" => Rule::Drive,
        "blockdev" => Rule::Blockdev,
        "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "fda" | "fdb" | "sd" | "pflash" => Rule::Disk,
        "mtdblock" => Rule::Refuse("a disk"),
        "net" | "nic" | "netdev" => Rule::Network,
        "fsdev" | "virtfs" => Rule::Refuse("a shared folder"),
        "loadvm" | "readconfig" | "set" => Rule::Refuse("settings from elsewhere"),
        "audiodev" => Rule::Audio,
        "tpmdev" | "usbdevice" | "audio" | "spice" | "chroot" | "runas" | "run-with" => {
            Rule::Refuse("a thing of the host")
        }
        _ => Rule::Unknown,
    }
}

/// The options of a command line, without their dashes, each with its value. Of an option that is not known the next
/// word is the value, unless it is an option.
pub fn options(argv: &[String]) -> Vec<(&str, Option<&str>)> {
    let mut words = argv.iter().map(String::as_str).peekable();
    let mut options = vec![];
    while let Some(word) = words.next() {
        // A word alone is a disk.
        let Some(option) = word.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)) else { continue };
        let value = match rule(option) {
            Rule::Keep(false) | Rule::Drop(false) => None,
            Rule::Unknown => words.next_if(|next| !next.starts_with('-')),
            _ => words.next(),
        };
        options.push((option, value));
    }
    options
}

/// Devices that need nothing of the host, so that every clone may have its own.
const DEVICES: [&str; 62] = [
    "vmgenid",
    // Only where its memory is a ROM, see memory.rs.
    "nvdimm",
    "virtio-rng-pci",
    "virtio-rng-pci-non-transitional",
    "virtio-rng-pci-transitional",
    "virtio-rng-device",
    "isa-serial",
    "isa-debugcon",
    "isa-debug-exit",
    "pvpanic",
    "pvpanic-pci",
    "pcie-root-port",
    "pcie-pci-bridge",
    "pci-bridge",
    "ioh3420",
    "i6300esb",
    "VGA",
    "cirrus-vga",
    "bochs-display",
    "qemu-xhci",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "virtio-keyboard-pci",
    "virtio-tablet-pci",
    "virtio-blk-pci",
    "virtio-blk-pci-non-transitional",
    "virtio-blk-pci-transitional",
    "virtio-blk-device",
    "virtio-scsi-pci",
    "virtio-scsi-pci-non-transitional",
    "virtio-scsi-pci-transitional",
    "virtio-scsi-device",
    "scsi-hd",
    "scsi-cd",
    "ide-hd",
    "ide-cd",
    "ich9-ahci",
    "piix3-ide",
    "piix4-ide",
    "lsi53c895a",
    "usb-storage",
    "usb-ehci",
    "ich9-usb-ehci1",
    "ich9-usb-uhci1",
    "ich9-usb-uhci2",
    "ich9-usb-uhci3",
    "piix3-usb-uhci",
    "nec-usb-xhci",
    "usb-hub",
    "floppy",
    "pci-serial",
    "virtio-serial-pci",
    "virtio-serial-pci-non-transitional",
    "virtio-serial-pci-transitional",
    "virtio-serial-device",
    "virtserialport",
    "virtconsole",
    "virtio-gpu-pci",
    "virtio-vga",
    "virtio-mouse-pci",
    "vhost-vsock-pci",
];

/// Why clones cannot have a device that is not among these.
pub fn why_not(driver: &str) -> &'static str {
    if driver.starts_with("vhost-user") {
        ": its other end is a process of the host that shares the RAM"
    } else if driver.starts_with("vhost-vdpa") || driver.starts_with("vfio") || driver == "usb-host" {
        ": a device of the host"
    } else if driver.starts_with("tpm-") {
        ": a TPM, whose state is not the clone's"
    } else if driver.contains("9p") || driver.contains("user-fs") {
        ": a shared folder"
    } else if driver.contains("balloon") || driver.contains("virtio-mem") {
        ": it gives pages of the template back to the host"
    } else {
        ""
    }
}

/// Properties of a device that name something of the host.
pub fn is_of_host(key: &str, value: &str) -> bool {
    matches!(key, "vhostfd" | "vhost-fd" | "fd" | "host" | "hostdev" | "sysfsdev")
        || (key == "romfile" && !value.is_empty())
}

/// The type of a device that QEMU also knows by a shorter name.
pub fn device_type(driver: &str) -> &str {
    match driver {
        "ac97" => "AC97",
        "ahci" => "ich9-ahci",
        "e1000-82540em" => "e1000",
        "es1370" => "ES1370",
        "lsi" => "lsi53c895a",
        "virtio-9p" => "virtio-9p-pci",
        "virtio-balloon" => "virtio-balloon-pci",
        "virtio-blk" => "virtio-blk-pci",
        "virtio-gpu" => "virtio-gpu-pci",
        "virtio-input-host" => "virtio-input-host-pci",
        "virtio-iommu" => "virtio-iommu-pci",
        "virtio-keyboard" => "virtio-keyboard-pci",
        "virtio-mouse" => "virtio-mouse-pci",
        "virtio-net" => "virtio-net-pci",
        "virtio-rng" => "virtio-rng-pci",
        "virtio-scsi" => "virtio-scsi-pci",
        "virtio-serial" => "virtio-serial-pci",
        "virtio-sound" => "virtio-sound-pci",
        "virtio-tablet" => "virtio-tablet-pci",
        driver => driver,
    }
}

/// True for a device that clones may have, by its type.
pub fn is_device_for_clones(driver: &str) -> bool {
    DEVICES.contains(&driver) || super::network::is_nic(driver)
}

/// For an option that is of the machine or its memory: the key of its first word without one.
pub fn implied(option: &str) -> Option<&'static str> {
    match option {
        "M" | "machine" | "numa" => Some("type"),
        "object" => Some("qom-type"),
        "device" => Some("driver"),
        "m" => Some("size"),
        "smp" => Some("cpus"),
        _ => None,
    }
}
