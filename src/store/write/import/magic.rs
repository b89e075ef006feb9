//! Magic bytes of formats that hold guest memory, or may be mistaken for it, but are not plain RAM.

use crate::store::format::firecracker::FirecrackerState;

/// Bytes examined at the start of a source.
pub(super) const HEAD: usize = 4096;
/// Bytes examined at the end of a source.
pub(super) const TAIL: usize = 512;

/// Position of magic bytes in a file.
#[derive(Debug, Clone, Copy)]
enum Place {
    At(usize),
    /// Offset from the end, in bytes.
    BeforeEnd(usize),
}
use Place::{At, BeforeEnd};

/// Description of a format, and how to import its content.
pub(super) type Format = (&'static str, &'static str);

const DISK: &str = "import the guest's RAM, not its disk";
const LIVE: &str =
    "run the guest in QEMU with its RAM in a file, then save RAM and state with 'stencil capture'";
const DUMP: &str = "convert the file to an image without a header that has each page at its physical address";
const VIRSH: &str = "run 'virsh restore', then save RAM and state with 'stencil capture'";
const HIBERNATED: &str = "resume the guest, then save its RAM while the guest runs";

const TABLE: &[(Place, &[u8], Format)] = &[
    // Memory dumps.
    (
        At(0),
        b"EMiL",
        (
            "a LiME dump, in which headers precede the RAM ranges",
            "run 'avml-convert --source-format lime --format raw FILE RAW'",
        ),
    ),
    (
        At(0),
        b"AVML",
        (
            "a compressed AVML dump",
            "run 'avml-convert --source-format lime_compressed --format raw FILE RAW'",
        ),
    ),
    (At(0), b"\x7fELF", ("an ELF file (a core dump?)", DUMP)),
    (At(0), b"\xcf\xfa\xed\xfe", ("a Mach-O file (a core dump?)", DUMP)),
    (At(0), b"KDUMP   ", ("a kdump file, as written by makedumpfile or dump-guest-memory", DUMP)),
    (At(0), b"DISKDUMP", ("a diskdump file", DUMP)),
    (At(0), b"makedumpfile\0", ("a flattened kdump file", DUMP)),
    (At(0), b"PAGEDU64", ("a Windows crash dump", DUMP)),
    (At(0), b"PAGEDUMP", ("a Windows crash dump", DUMP)),
    (At(0), b"EVF\x09\x0d\x0a\xff\0", ("an EnCase image", DUMP)),
    // Saved guests.
    (At(0), b"QEVM", ("a QEMU migration stream", LIVE)),
    (At(0), b"LibvirtQemudSave", ("a domain saved by libvirt", VIRSH)),
    (At(0), b"LibvirtQemudPart", ("a domain partly saved by libvirt", VIRSH)),
    (At(0), b"Xen saved domain", ("a domain saved by Xen", LIVE)),
    (At(0), b"LinuxGuestRecord", ("a domain saved by Xen", LIVE)),
    (At(0), b"\xff\xff\xff\xff\xff\xff\xff\xffXENF", ("a Xen migration stream", LIVE)),
    (At(0), b"\x7fVirtualBox SavedState", ("a VirtualBox saved state", LIVE)),
    (
        At(0),
        b"\xd0\xbe\xd2\xbe",
        ("a VMware suspended state", "import the .vmem file beside it, which has the RAM"),
    ),
    (
        At(0),
        b"\xd1\xba\xd1\xba",
        ("a VMware suspended state", "import the .vmem file beside it, which has the RAM"),
    ),
    (
        At(0),
        b"\xd2\xbe\xd2\xbe",
        ("a VMware suspended state", "import the .vmem file beside it, which has the RAM"),
    ),
    (
        At(0),
        b"\xd3\xbe\xd3\xbe",
        ("a VMware suspended state", "import the .vmem file beside it, which has the RAM"),
    ),
    (At(0), b"\x14\x20\x28\x01", ("a Hyper-V saved state", LIVE)),
    (At(4086), b"S1SUSPEND", ("a Linux hibernation image", HIBERNATED)),
    (At(4086), b"ULSUSPEND", ("a Linux hibernation image", HIBERNATED)),
    (At(4086), b"LINHIB0001", ("a Linux hibernation image", HIBERNATED)),
    (At(4086), b"SWAPSPACE2", ("a swap area", "import the guest's RAM")),
    (At(0), b"HIBR", ("a Windows hibernation file", HIBERNATED)),
    (At(0), b"hibr", ("a Windows hibernation file", HIBERNATED)),
    // Disk images.
    (At(0), b"QFI\xfb", ("a qcow2 image", DISK)),
    (At(0), b"QED\0", ("a QED image", DISK)),
    (At(0), b"KDMV", ("a VMDK image", DISK)),
    (At(0), b"COWD", ("a VMDK image", DISK)),
    (At(0), b"# Disk DescriptorFile", ("a VMDK descriptor file", DISK)),
    (At(0), b"vhdxfile", ("a VHDX image", DISK)),
    (At(0), b"conectix", ("a VHD image", DISK)),
    (BeforeEnd(512), b"conectix", ("a VHD image", DISK)),
    (At(64), b"\x7f\x10\xda\xbe", ("a VDI image", DISK)),
    (At(0), b"WithoutFreeSpace", ("a Parallels disk image", DISK)),
    (At(0), b"WithouFreSpacExt", ("a Parallels disk image", DISK)),
    (At(0), b"LUKS\xba\xbe", ("an encrypted disk", DISK)),
    (At(0), b"hsqs", ("a squashfs image", DISK)),
    // Archives and compressed files.
    (At(0), b"\x1f\x8b\x08", ("a gzip file", "run 'zcat FILE | stencil import - NAME'")),
    (At(0), b"\x28\xb5\x2f\xfd", ("a zstd file", "run 'zstdcat FILE | stencil import - NAME'")),
    (At(0), b"\xfd7zXZ\0", ("an xz file", "run 'xzcat FILE | stencil import - NAME'")),
    (At(0), b"\x04\x22\x4d\x18", ("an lz4 file", "run 'lz4cat FILE | stencil import - NAME'")),
    (At(4), b"1AY&SY", ("a bzip2 file", "run 'bzcat FILE | stencil import - NAME'")),
    (At(0), b"\xff\x06\0\0sNaPpY", ("a snappy file", "decompress the file, then import the result")),
    (At(0), b"\x89LZO\0\r\n", ("an lzop file", "run 'lzop -dc FILE | stencil import - NAME'")),
    (At(0), b"PK\x03\x04", ("a zip archive", "run 'unzip -p FILE | stencil import - NAME'")),
    (At(0), b"7z\xbc\xaf\x27\x1c", ("a 7z archive", "run '7z x -so FILE | stencil import - NAME'")),
    (At(257), b"ustar", ("a tar archive", "extract the archive, then import the file with the RAM")),
    (At(0), b"STNCLSAV", ("a stream from 'stencil save'", "run 'stencil load -i FILE'")),
];

/// Returns the format of a file from the bytes at its start and end, or `None` if the file may be plain RAM.
pub(super) fn identify(head: &[u8], tail: &[u8]) -> Option<Format> {
    let is = |place: Place, magic: &[u8]| match place {
        At(at) => head.get(at..).is_some_and(|bytes| bytes.starts_with(magic)),
        BeforeEnd(before) => {
            tail.len().checked_sub(before).and_then(|at| tail.get(at..)).is_some_and(|b| b.starts_with(magic))
        }
    };
    let found = TABLE.iter().find(|(place, magic, _)| is(*place, magic)).map(|(_, _, format)| *format);
    found.or_else(|| {
        FirecrackerState::header(head)
            .is_ok()
            .then_some(("a Firecracker state file", "run 'stencil import MEMORY NAME --state STATE'"))
    })
}

/// Returns true if the first [`HEAD`] bytes are those of a file system or of a partitioned disk. Only for the choice
/// between several files: guest memory may begin with any bytes.
pub(super) fn is_file_system(head: &[u8]) -> bool {
    let is = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|bytes| bytes.starts_with(magic));
    // ext2 to ext4, XFS, GPT.
    is(0x438, b"\x53\xef") || is(0, b"XFSB") || is(512, b"EFI PART")
}

#[cfg(test)]
mod tests {
    use crate::store::write::import::magic::*;

    #[test]
    fn identifies_the_format_of_every_row() {
        for (place, magic, expected) in TABLE {
            let (mut head, mut tail) = (vec![0; HEAD], vec![0; TAIL]);
            let (part, at) = match *place {
                At(at) => (&mut head, at),
                BeforeEnd(before) => (&mut tail, TAIL - before),
            };
            part[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(identify(&head, &tail), Some(*expected));
            assert!(magic.len() >= 3, "two bytes are too few to identify a format: {expected:?}");
        }
        assert_eq!(
            TABLE.iter().filter(|(_, magic, _)| *magic == crate::store::format::stream::MAGIC).count(),
            1
        );
    }

    #[test]
    fn accepts_plain_memory() {
        let (zeros, ones) = (vec![0; HEAD], vec![0xff; HEAD]);
        // An interrupt vector table as a BIOS initializes it.
        let vectors: Vec<u8> = [0x53, 0xff, 0x00, 0xf0].repeat(HEAD / 4);
        for head in [&zeros, &ones, &vectors, &vec![]] {
            assert_eq!(identify(head, &head[head.len().saturating_sub(TAIL)..]), None);
        }
    }
}
