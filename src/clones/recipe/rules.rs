//! What becomes of each option and device of a QEMU when its command line becomes one of clones.

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
    /// Refused as what it names, but for a network that is `none`.
    Refuse(&'static str),
    /// Refused by name.
    Unknown,
}

/// The rule of an option, without its dashes.
pub fn rule(option: &str) -> Rule {
    match option {
        "enable-kvm" | "nodefaults" | "no-user-config" | "nographic" | "no-reboot" | "no-shutdown"
        | "no-acpi" | "no-hpet" | "no-fd-bootchk" | "usb" => Rule::Keep(false),
        "accel" | "cpu" | "smp" | "m" | "overcommit" | "numa" | "boot" | "vga" | "k" | "rtc" | "icount"
        | "global" | "L" | "bios" | "append" | "smbios" | "fw_cfg" | "action" | "uuid" | "msg" | "compat"
        | "sandbox" => Rule::Keep(true),
        "daemonize" | "S" | "s" => Rule::Drop(false),
        "pidfile" | "name" | "D" | "d" | "trace" | "monitor" | "qmp" | "qmp-pretty" | "incoming"
        | "parallel" | "display" | "vnc" | "gdb" => Rule::Drop(true),
        "M" | "machine" => Rule::Machine,
        "object" => Rule::Object,
        "device" => Rule::Device,
        "chardev" => Rule::Chardev,
        "serial" => Rule::Serial,
        "mon" => Rule::Mon,
        "kernel" | "initrd" => Rule::File,
        "drive" | "blockdev" | "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "fda" | "fdb" | "mtdblock"
        | "sd" | "pflash" => Rule::Refuse("a disk"),
        "net" | "nic" | "netdev" => Rule::Refuse("a network"),
        "fsdev" | "virtfs" => Rule::Refuse("a shared folder"),
        "loadvm" | "readconfig" | "set" => Rule::Refuse("settings from elsewhere"),
        "tpmdev" | "usbdevice" | "audiodev" | "audio" | "spice" | "chroot" | "runas" | "run-with" => {
            Rule::Refuse("a thing of the host")
        }
        _ => Rule::Unknown,
    }
}

/// Devices that need nothing of the host, so that every clone may have its own.
const DEVICES: [&str; 23] = [
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
    "qemu-xhci",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "virtio-keyboard-pci",
    "virtio-tablet-pci",
];

/// True for a device that clones may have.
pub fn is_device_for_clones(driver: &str) -> bool {
    DEVICES.contains(&driver)
}
