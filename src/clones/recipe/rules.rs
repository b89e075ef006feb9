//! Rules for the conversion of QEMU options and devices to those of clones.

use super::props::Props;

/// The conversion of one QEMU option.
pub enum Rule {
    /// Keeps the option; `true` if it takes a value.
    Keep(bool),
    /// Drops the option, or replaces it at the end; `true` if it takes a value.
    Drop(bool),
    /// Keeps the machine, with its type pinned to a version.
    Machine,
    /// Converts memory backends to files of the template.
    Object,
    /// Keeps a device that needs no host resource.
    Device,
    /// Drops the character devices of monitors and redirects all others into the clone's directory.
    Chardev,
    /// Redirects a serial line into the clone's directory.
    Serial,
    /// Drops a monitor with its character device.
    Mon,
    /// Stores the file that is the value in the template, under the option's name.
    File,
    /// Stores the file if the value is a path; keeps the option unchanged otherwise.
    FileIfPath,
    /// Converts a network.
    Network,
    /// Keeps an audio backend without host resources.
    Audio,
    /// Converts a disk with properties.
    Drive,
    /// Converts a disk that is named by its file alone.
    Disk,
    /// Converts a block node.
    Blockdev,
    /// Keeps the option; its files go into the template, its UUID becomes a placeholder.
    Firmware,
    /// Connects a parallel port to nothing.
    Parallel,
    /// Refuses the option for this reason.
    Refuse(&'static str),
    /// Refuses the option as unknown.
    Unknown,
}

/// Returns the reason why this value of a kept option is unsupported for clones.
pub fn unsupported_value(option: &str, value: &str) -> Option<String> {
    let props = Props::parse(value, "")?;
    // Host files that are not stored in the template: a replay log that QEMU writes, a picture that firmware shows.
    let of_host: &[&str] = match option {
        "icount" => &["rr", "rrfile"],
        "boot" => &["splash"],
        _ => &[],
    };
    let key = of_host.iter().find(|key| props.get(key).is_some());
    key.map(|key| format!("{key}= names a host file")).or_else(|| locks_memory(option, value))
}

/// Returns the reason against an `-overcommit` that locks memory.
///
/// `mlockall(2)` populates a private mapping with write faults, which copy every page of the template. With
/// `mem-lock=on-fault` the kernel locks only pages that the guest touches, and a page that is only read stays shared.
pub fn locks_memory(option: &str, value: &str) -> Option<String> {
    let props = Props::parse(value, "").filter(|_| option == "overcommit")?;
    let locks = !matches!(props.get("mem-lock")?, "off" | "no" | "false" | "n" | "on-fault");
    locks.then(|| "locking memory would copy all RAM of the template in each clone".to_owned())
}

/// Returns the rule of an option, given without its dashes.
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
        "fsdev" | "virtfs" => Rule::Refuse("a shared directory"),
        "loadvm" | "readconfig" | "set" => Rule::Refuse("settings from a file or another source"),
        "audiodev" => Rule::Audio,
        "tpmdev" | "usbdevice" | "audio" | "spice" | "chroot" | "runas" | "run-with" => {
            Rule::Refuse("a host resource")
        }
        _ => Rule::Unknown,
    }
}

/// Splits a command line into options, without their dashes, and their values. The word after an unknown option is its
/// value, unless that word is an option.
pub fn options(argv: &[String]) -> Vec<(&str, Option<&str>)> {
    let mut words = argv.iter().map(String::as_str).peekable();
    let mut options = vec![];
    while let Some(word) = words.next() {
        // A word without an option is a disk image.
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

/// Devices that need no host resource, so that every clone can have its own.
const DEVICES: [&str; 62] = [
    "vmgenid",
    // An nvdimm is supported only if its memory is a ROM, see memory.rs.
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

/// NICs that QEMU can migrate.
const NICS: [&str; 14] = [
    "virtio-net-pci",
    "virtio-net-pci-non-transitional",
    "virtio-net-pci-transitional",
    "virtio-net-device",
    "e1000",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "igb",
    "rtl8139",
    "ne2k_pci",
    "pcnet",
    "vmxnet3",
    "usb-net",
];

/// Returns true for the driver of a network card.
pub fn is_nic(driver: &str) -> bool {
    NICS.contains(&driver)
}

/// Returns the reason why a device is unsupported for clones, as a suffix of the refusal; empty if no reason is known.
pub fn unsupported_reason(driver: &str) -> &'static str {
    if driver.starts_with("vhost-user") {
        ": its back end is a host process that needs shared RAM"
    } else if driver.starts_with("vhost-vdpa") || driver.starts_with("vfio") || driver == "usb-host" {
        ": a host device"
    } else if driver.starts_with("tpm-") {
        ": a TPM, whose state cannot be cloned"
    } else if driver.contains("9p") || driver.contains("user-fs") {
        ": a shared directory"
    } else if driver.contains("balloon") || driver.contains("virtio-mem") {
        ": returns template pages to the host"
    } else {
        ""
    }
}

/// Returns true for a device property that refers to a host resource.
pub fn is_host_resource(key: &str, value: &str) -> bool {
    matches!(key, "vhostfd" | "vhost-fd" | "fd" | "host" | "hostdev" | "sysfsdev")
        || (key == "romfile" && !value.is_empty())
}

/// Resolves QEMU's aliases of device types; returns other names unchanged.
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

/// Returns true for a device type that is supported for clones.
pub fn is_device_for_clones(driver: &str) -> bool {
    DEVICES.contains(&driver) || is_nic(driver)
}

/// Returns the implied key of the first word of an option that describes the machine or its memory.
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
