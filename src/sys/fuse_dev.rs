//! `/dev/fuse`: the parts of its protocol that no crate speaks.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::tasks;
use super::wait::poll_for;
use crate::error::{Error, Result};

/// The kernel reads and writes no request of less than this, in bytes.
const MIN_READ_BUFFER: usize = 8192 * 2;
const FUSE_INIT: u32 = 26;
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
const NOTIFY_RESEND: i32 = 7;

/// `_IOW(229, 1, struct fuse_backing_map)`, 16 bytes.
const IOC_BACKING_OPEN: libc::c_ulong = 0x4010_E501;
/// `_IOW(229, 2, uint32_t)`.
const IOC_BACKING_CLOSE: libc::c_ulong = 0x4004_E502;

#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// Opens `/dev/fuse`: a new connection.
///
/// # Errors
/// Names what is missing: the device, or the right to open it.
pub fn open() -> Result<OwnedFd> {
    let path = Path::new("/dev/fuse");
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(file.into()),
        Err(e) => {
            let remedy = match e.raw_os_error() {
                Some(libc::ENOENT) => {
                    "load the module `fuse` (modprobe fuse); in a container pass the device on (--device /dev/fuse)"
                }
                Some(libc::ENXIO | libc::ENODEV) => "the kernel has no FUSE: load the module `fuse`",
                _ => "run it as root, or as a user who may read and write /dev/fuse",
            };
            Err(Error::io("cannot open the FUSE device", path, e).remedy(remedy))
        }
    }
}

/// Which connection a descriptor of `/dev/fuse` belongs to: the `st_dev` of its mount; none where the kernel does not
/// say so.
///
/// # Errors
/// `InvalidData` for what is no descriptor of `/dev/fuse` with a connection.
pub fn connection_of(fuse: impl AsFd) -> io::Result<Option<u64>> {
    const DEVICE: (u32, u32) = (10, 229);
    let stat = rustix::fs::fstat(&fuse)?;
    if (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) != DEVICE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fuse.as_fd().as_raw_fd()))?;
    parse_connection(&about)
}

/// True when a process has a descriptor of the connection of that device, where the kernel says whose one is.
pub fn is_held_by(pid: u32, device: u64) -> bool {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| {
        let files = std::fs::read_dir(thread.join("fd")).into_iter().flatten().flatten();
        files.map(|file| (thread.join("fdinfo").join(file.file_name()), file.path()))
    });
    entries.into_iter().any(|(about, path)| {
        // The device may have any path; it has its name.
        let is_fuse = std::fs::read_link(path).is_ok_and(|to| to.ends_with("fuse"));
        let about = || std::fs::read_to_string(about).ok();
        is_fuse
            && about().is_some_and(|about| matches!(parse_connection(&about), Ok(Some(its)) if its == device))
    })
}

/// Reads the text of a `fdinfo` file. The kernel prints its own form of the device number; anonymous ones have major 0.
fn parse_connection(about: &str) -> io::Result<Option<u64>> {
    let Some(number) = about.lines().find_map(|line| line.strip_prefix("fuse_connection:")) else {
        return Ok(None);
    };
    let number: u32 = number.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some(rustix::fs::makedev(number >> 20, number & 0xf_ffff)))
}

/// Waits for the first request of a connection, which is always INIT.
///
/// # Errors
/// The device's, or `InvalidData` for another request.
pub fn read_init(fuse: impl AsFd) -> io::Result<Vec<u8>> {
    let mut packet = vec![0; MIN_READ_BUFFER];
    let n = loop {
        match rustix::io::read(&fuse, &mut packet[..]) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            other => break other?,
        }
    };
    packet.truncate(n);
    // struct fuse_in_header: u32 len, u32 opcode, …
    match packet.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes) {
        Some(FUSE_INIT) => Ok(packet),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the first request has opcode {other:?}, expected INIT"),
        )),
    }
}

/// Writes a finished reply.
///
/// # Errors
/// The device's.
pub fn write_reply(fuse: impl AsFd, reply: &[u8]) -> io::Result<()> {
    let n = rustix::io::write(fuse, reply)?;
    if n == reply.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Asks the kernel to hand out again every request that was read and not answered (FUSE_NOTIFY_RESEND).
///
/// # Errors
/// The device's.
pub fn resend(fuse: impl AsFd) -> io::Result<()> {
    notify(fuse, NOTIFY_RESEND, &[])
}

/// Has the kernel forget a name in the folder with that inode number. It asks for the name again at the next lookup; an
/// inode that nobody uses goes with its last name, and its page cache with it. Waits for lookups in that folder.
///
/// # Errors
/// The device's. A name that the kernel does not know is forgotten already.
pub fn forget_name(fuse: impl AsFd, folder: u64, name: &str) -> io::Result<()> {
    // struct fuse_notify_inval_entry_out: u64 parent, u32 namelen, u32 flags; then the name and a zero.
    let mut body = folder.to_ne_bytes().to_vec();
    body.extend((name.len() as u32).to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend(name.as_bytes());
    body.push(0);
    known(notify(fuse, NOTIFY_INVAL_ENTRY, &body)).map(drop)
}

/// Those of the inodes that the kernel has: somebody has the file open or mapped, in whatever way, or its name is cached.
///
/// # Errors
/// The device's.
pub fn known_inodes(fuse: impl AsFd, inodes: &[u64]) -> io::Result<Vec<u64>> {
    let mut known = Vec::new();
    for &inode in inodes {
        if is_inode_known(&fuse, inode)? {
            known.push(inode);
        }
    }
    Ok(known)
}

fn is_inode_known(fuse: impl AsFd, inode: u64) -> io::Result<bool> {
    // struct fuse_notify_inval_inode_out: u64 ino, i64 off, i64 len. A negative offset leaves the page cache alone.
    let mut body = inode.to_ne_bytes().to_vec();
    body.extend((-1i64).to_ne_bytes());
    body.extend(0i64.to_ne_bytes());
    known(notify(fuse, NOTIFY_INVAL_INODE, &body))
}

/// What the kernel answers to a notice about something that it may not know.
fn known(notified: io::Result<()>) -> io::Result<bool> {
    match notified {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn notify(fuse: impl AsFd, code: i32, body: &[u8]) -> io::Result<()> {
    // struct fuse_out_header: u32 len, i32 error (the notification's code), u64 unique = 0.
    let mut notice = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    notice.extend(code.to_ne_bytes());
    notice.extend([0; 8]);
    notice.extend(body);
    write_reply(fuse, &notice)
}

/// True once the connection is over: its superblock is gone, or it was aborted.
pub fn is_over(fuse: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fuse, PollFlags::empty())];
    matches!(poll_for(&mut fds, Some(Duration::ZERO)), Ok(1)) && fds[0].revents().contains(PollFlags::ERR)
}

/// Registers a file as a passthrough backing of the connection. The id belongs to the connection, not to the process.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN or where passthrough was not agreed on, `ELOOP` for a file on a stacked filesystem.
pub fn backing_open(fuse: impl AsFd, file: impl AsFd) -> io::Result<u32> {
    let map = BackingMap { fd: file.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: both descriptors are open for the length of the call; the kernel reads 16 bytes from `map`, which has
    // the layout of struct fuse_backing_map, and writes nothing.
    let id = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), IOC_BACKING_OPEN, &raw const map) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

/// Forgets a backing. Open files and mappings keep it.
///
/// # Errors
/// `ENOENT` for an id that is not open.
pub fn backing_close(fuse: impl AsFd, id: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call; the kernel reads 4 bytes from `id`.
    let result = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), IOC_BACKING_CLOSE, &raw const id) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the descriptor number of `target` refer to what `source` refers to, close-on-exec. Whoever owns `target` goes
/// on owning that number; what it referred to before is closed.
///
/// # Errors
/// The system's.
pub fn replace_descriptor(target: BorrowedFd<'_>, source: impl AsFd) -> io::Result<()> {
    loop {
        // SAFETY: both numbers are open descriptors for the length of the call, and dup3 touches no memory. The owner
        // of `target` keeps a valid descriptor: the number never becomes free.
        let result = unsafe { libc::dup3(source.as_fd().as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};

    #[test]
    fn a_replaced_descriptor_keeps_its_number() {
        let mut a = tempfile::tempfile().unwrap();
        let mut b = tempfile::tempfile().unwrap();
        b.write_all(b"b").unwrap();
        b.seek(SeekFrom::Start(0)).unwrap();
        let number = a.as_raw_fd();
        replace_descriptor(a.as_fd(), &b).unwrap();
        let mut text = String::new();
        a.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), a.as_raw_fd()), ("b", number));
    }

    #[test]
    fn the_kernel_says_whose_descriptor_it_is() {
        assert_eq!(parse_connection("pos:\t0\nflags:\t02\nfuse_connection:\t58\n").unwrap(), Some(58));
        assert_eq!(parse_connection("pos:\t0\n").unwrap(), None, "an older kernel");
        assert!(parse_connection("fuse_connection:\tx").is_err());
        assert!(connection_of(tempfile::tempfile().unwrap()).is_err());
        let dir = tempfile::tempdir().unwrap();
        let fuse = open().unwrap();
        crate::sys::mount::mount_fuse(&fuse, dir.path(), dir.path(), false).unwrap();
        let mounts = crate::sys::procfs::mounts().unwrap();
        let device = mounts.into_iter().rfind(|m| m.mountpoint == dir.path()).map(|m| m.dev);
        let held = device.map(|device| is_held_by(std::process::id(), device));
        // A number that no mount of this process has.
        let other = device.map(|_| is_held_by(std::process::id(), rustix::fs::makedev(0, 0xf_ffff)));
        crate::sys::mount::unmount(dir.path(), true).unwrap();
        assert_eq!(connection_of(&fuse).unwrap(), device);
        assert_eq!((held, other), (Some(true), Some(false)));
    }

    #[test]
    fn a_new_connection_is_not_over_and_has_no_backing() {
        let fuse = open().unwrap();
        assert!(!is_over(&fuse) || backing_close(&fuse, 1).is_err());
    }
}
