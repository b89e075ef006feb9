//! Files that hold a guest's memory, or might be taken for it, and are not plain RAM: known by bytes at fixed places.

use crate::store::firecracker::FirecrackerState;

/// So many bytes from the start are looked at.
pub(super) const HEAD: usize = 4096;
/// And so many before the end.
pub(super) const TAIL: usize = 512;

/// Where the bytes are.
#[derive(Debug, Clone, Copy)]
enum Place {
    At(usize),
    /// So many bytes before the end.
    BeforeEnd(usize),
}
use Place::{At, BeforeEnd};

/// What a file is, and what to do with it.
pub(super) type Known = (&'static str, &'static str);

const DISK: &str = "import the guest's RAM, not its disk";
const LIVE: &str =
    "run the guest in QEMU with its RAM in a file, then `stencil capture` takes RAM and state apart";
const DUMP: &str = "convert it to an image that holds each page at its physical address, without a header";
const VIRSH: &str =
    "start the domain again (virsh restore), then `stencil capture` takes RAM and state apart";
const HIBERNATED: &str = "resume the guest, then take its RAM while it runs";

const TABLE: &[(Place, &[u8], Known)] = &[
    // Dumps of memory.
    (
        At(0),
        b"EMiL",
        (
            "a LiME dump: ranges of RAM behind headers",
            "convert it: avml-convert --source-format lime --format raw FILE RAW",
        ),
    ),
    (
        At(0),
        b"AVML",
        (
            "a compressed AVML dump",
            "convert it: avml-convert --source-format lime_compressed --format raw FILE RAW",
        ),
    ),
    (At(0), b"\x7fELF", ("an ELF file (a core dump?)", DUMP)),
    (At(0), b"\xcf\xfa\xed\xfe", ("a Mach-O file (a core dump?)", DUMP)),
    (At(0), b"KDUMP   ", ("a kdump file, as makedumpfile and dump-guest-memory write them", DUMP)),
    (At(0), b"DISKDUMP", ("a diskdump file", DUMP)),
    (At(0), b"makedumpfile\0", ("a flattened kdump file", DUMP)),
    (At(0), b"PAGEDU64", ("a Windows crash dump", DUMP)),
    (At(0), b"PAGEDUMP", ("a Windows crash dump", DUMP)),
    (At(0), b"EVF\x09\x0d\x0a\xff\0", ("an EnCase image", DUMP)),
    // Saved guests.
    (At(0), b"QEVM", ("a QEMU migration stream", LIVE)),
    (At(0), b"LibvirtQemudSave", ("a domain that libvirt has saved", VIRSH)),
    (At(0), b"LibvirtQemudPart", ("a domain that libvirt has saved in part", VIRSH)),
    (At(0), b"Xen saved domain", ("a domain that Xen has saved", LIVE)),
    (At(0), b"LinuxGuestRecord", ("a domain that Xen has saved", LIVE)),
    (At(0), b"\xff\xff\xff\xff\xff\xff\xff\xffXENF", ("a migration stream of Xen", LIVE)),
    (At(0), b"\x7fVirtualBox SavedState", ("a saved state of VirtualBox", LIVE)),
    (
        At(0),
        b"\xd0\xbe\xd2\xbe",
        ("a suspended guest's state of VMware", "the RAM is in the .vmem file beside it: import that"),
    ),
    (
        At(0),
        b"\xd1\xba\xd1\xba",
        ("a suspended guest's state of VMware", "the RAM is in the .vmem file beside it: import that"),
    ),
    (
        At(0),
        b"\xd2\xbe\xd2\xbe",
        ("a suspended guest's state of VMware", "the RAM is in the .vmem file beside it: import that"),
    ),
    (
        At(0),
        b"\xd3\xbe\xd3\xbe",
        ("a suspended guest's state of VMware", "the RAM is in the .vmem file beside it: import that"),
    ),
    (At(0), b"\x14\x20\x28\x01", ("a saved state of Hyper-V", LIVE)),
    (At(4086), b"S1SUSPEND", ("a hibernation image of Linux", HIBERNATED)),
    (At(4086), b"ULSUSPEND", ("a hibernation image of Linux", HIBERNATED)),
    (At(4086), b"LINHIB0001", ("a hibernation image of Linux", HIBERNATED)),
    (At(4086), b"SWAPSPACE2", ("a swap area", "import the guest's RAM")),
    (At(0), b"HIBR", ("a hibernation file of Windows", HIBERNATED)),
    (At(0), b"hibr", ("a hibernation file of Windows", HIBERNATED)),
    // Disks.
    (At(0), b"QFI\xfb", ("a qcow2 image", DISK)),
    (At(0), b"QED\0", ("a QED image", DISK)),
    (At(0), b"KDMV", ("a VMDK image", DISK)),
    (At(0), b"COWD", ("a VMDK image", DISK)),
    (At(0), b"# Disk DescriptorFile", ("the descriptor of a VMDK image", DISK)),
    (At(0), b"vhdxfile", ("a VHDX image", DISK)),
    (At(0), b"conectix", ("a VHD image", DISK)),
    (BeforeEnd(512), b"conectix", ("a VHD image", DISK)),
    (At(64), b"\x7f\x10\xda\xbe", ("a VDI image", DISK)),
    (At(0), b"WithoutFreeSpace", ("an image of Parallels", DISK)),
    (At(0), b"WithouFreSpacExt", ("an image of Parallels", DISK)),
    (At(0), b"LUKS\xba\xbe", ("an encrypted disk", DISK)),
    (At(0), b"hsqs", ("a squashfs image", DISK)),
    // Archives and compressed files.
    (At(0), b"\x1f\x8b\x08", ("compressed by gzip", "pipe it: zcat FILE | stencil import - NAME")),
    (At(0), b"\x28\xb5\x2f\xfd", ("compressed by zstd", "pipe it: zstdcat FILE | stencil import - NAME")),
    (At(0), b"\xfd7zXZ\0", ("compressed by xz", "pipe it: xzcat FILE | stencil import - NAME")),
    (At(0), b"\x04\x22\x4d\x18", ("compressed by lz4", "pipe it: lz4cat FILE | stencil import - NAME")),
    (At(4), b"1AY&SY", ("compressed by bzip2", "pipe it: bzcat FILE | stencil import - NAME")),
    (At(0), b"\xff\x06\0\0sNaPpY", ("compressed by snappy", "unpack it, then import what is in it")),
    (At(0), b"\x89LZO\0\r\n", ("compressed by lzop", "pipe it: lzop -dc FILE | stencil import - NAME")),
    (At(0), b"PK\x03\x04", ("a zip archive", "pipe it: unzip -p FILE | stencil import - NAME")),
    (At(0), b"7z\xbc\xaf\x27\x1c", ("a 7z archive", "pipe it: 7z x -so FILE | stencil import - NAME")),
    (At(257), b"ustar", ("a tar archive", "unpack it, then import the file with the RAM")),
    (At(0), b"STNCLSAV", ("a stream of stencil save", "load it: stencil load -i FILE")),
];

/// What the bytes at the start and at the end of a file belong to; nothing for what may be plain RAM.
pub(super) fn known(head: &[u8], tail: &[u8]) -> Option<Known> {
    let is = |place: Place, magic: &[u8]| match place {
        At(at) => head.get(at..).is_some_and(|bytes| bytes.starts_with(magic)),
        BeforeEnd(before) => {
            tail.len().checked_sub(before).and_then(|at| tail.get(at..)).is_some_and(|b| b.starts_with(magic))
        }
    };
    let found = TABLE.iter().find(|(place, magic, _)| is(*place, magic)).map(|(_, _, known)| *known);
    found.or_else(|| {
        FirecrackerState::header(head).is_ok().then_some((
            "a state file of Firecracker",
            "name the memory file first: stencil import MEMORY NAME --state STATE",
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_reached_and_its_bytes_are_looked_at() {
        for (place, magic, expected) in TABLE {
            let (mut head, mut tail) = (vec![0; HEAD], vec![0; TAIL]);
            let (part, at) = match *place {
                At(at) => (&mut head, at),
                BeforeEnd(before) => (&mut tail, TAIL - before),
            };
            part[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(known(&head, &tail), Some(*expected));
            assert!(magic.len() >= 3, "two bytes are no proof: {expected:?}");
        }
        assert_eq!(
            TABLE.iter().filter(|(_, magic, _)| *magic == crate::store::format::stream::MAGIC).count(),
            1
        );
    }

    #[test]
    fn plain_memory_is_none_of_them() {
        let (zeros, ones) = (vec![0; HEAD], vec![0xff; HEAD]);
        // An interrupt vector table as a BIOS leaves it.
        let vectors: Vec<u8> = [0x53, 0xff, 0x00, 0xf0].repeat(HEAD / 4);
        for head in [&zeros, &ones, &vectors, &vec![]] {
            assert_eq!(known(head, &head[head.len().saturating_sub(TAIL)..]), None);
        }
    }
}
