//! The parts of the `/dev/fuse` protocol that no crate implements.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::error::{Error, Result};
use crate::sys::poll::poll_for;
use crate::sys::process::tasks;

/// Minimum size in bytes of a read buffer: the kernel rejects smaller reads (`FUSE_MIN_READ_BUFFER`).
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

/// Opens `/dev/fuse`, which creates a new connection.
///
/// # Errors
/// Returns an error with a remedy if the device is missing or may not be opened.
pub fn open() -> Result<OwnedFd> {
    let path = Path::new("/dev/fuse");
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(file.into()),
        Err(e) => {
            let remedy = match e.raw_os_error() {
                Some(libc::ENOENT) => {
                    "load the kernel module fuse (modprobe fuse); in a container, pass --device /dev/fuse"
                }
                Some(libc::ENXIO | libc::ENODEV) => "load the kernel module fuse (modprobe fuse)",
                _ => "run the command as root, or as a user with read and write access to /dev/fuse",
            };
            Err(Error::io("cannot open FUSE device", path, e).hint(remedy))
        }
    }
}

/// Returns the connection of a `/dev/fuse` descriptor as the `st_dev` of its mount, or `None` if the kernel does not
/// report the connection in fdinfo.
///
/// # Errors
/// Returns `InvalidData` if the descriptor is not `/dev/fuse` or has no connection.
pub fn connection_of(fuse: impl AsFd) -> io::Result<Option<u64>> {
    const DEVICE: (u32, u32) = (10, 229);
    let stat = rustix::fs::fstat(&fuse)?;
    if (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) != DEVICE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fuse.as_fd().as_raw_fd()))?;
    parse_connection(&fdinfo)
}

/// Returns true if a process has a descriptor of the connection with this device number. Always false on kernels that
/// do not report the connection in fdinfo.
pub fn is_held_by(pid: u32, device: u64) -> bool {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| {
        let files = std::fs::read_dir(thread.join("fd")).into_iter().flatten().flatten();
        files.map(|file| (thread.join("fdinfo").join(file.file_name()), file.path()))
    });
    entries.into_iter().any(|(fdinfo, path)| {
        // The device node may be in any directory; only its name is fixed.
        let is_fuse = std::fs::read_link(path).is_ok_and(|to| to.ends_with("fuse"));
        let fdinfo = || std::fs::read_to_string(fdinfo).ok();
        is_fuse
            && fdinfo()
                .is_some_and(|text| matches!(parse_connection(&text), Ok(Some(found)) if found == device))
    })
}

/// Parses the text of a `fdinfo` file. The kernel prints its internal encoding of the device number, major << 20 |
/// minor.
fn parse_connection(fdinfo: &str) -> io::Result<Option<u64>> {
    let Some(number) = fdinfo.lines().find_map(|line| line.strip_prefix("fuse_connection:")) else {
        return Ok(None);
    };
    let number: u32 = number.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Some(rustix::fs::makedev(number >> 20, number & 0xf_ffff)))
}

/// Reads the first request of a connection, which is always INIT. Blocks until the request arrives.
///
/// # Errors
/// Returns an error if the read fails, and `InvalidData` for another request.
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
            format!("expected FUSE_INIT as first request, found opcode {other:?}"),
        )),
    }
}

/// Writes a complete reply.
///
/// # Errors
/// Returns an error if the write fails.
pub fn write_reply(fuse: impl AsFd, reply: &[u8]) -> io::Result<()> {
    let n = rustix::io::write(fuse, reply)?;
    if n == reply.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Makes the kernel resend every request that was read but not replied to (`FUSE_NOTIFY_RESEND`).
///
/// # Errors
/// Returns an error if the write fails.
pub fn resend(fuse: impl AsFd) -> io::Result<()> {
    notify(fuse, NOTIFY_RESEND, &[])
}

/// Makes the kernel drop a cached name in the directory with inode number `folder` (`FUSE_NOTIFY_INVAL_ENTRY`). The
/// next access to the name causes a lookup. An unused inode is evicted with its last name, and its page cache with it.
/// Waits for concurrent lookups in the directory.
///
/// # Errors
/// Returns an error if the write fails. A name that is not cached is not an error.
pub fn invalidate_name(fuse: impl AsFd, folder: u64, name: &str) -> io::Result<()> {
    // struct fuse_notify_inval_entry_out: u64 parent, u32 namelen, u32 flags; then the name and a NUL byte.
    let mut body = folder.to_ne_bytes().to_vec();
    body.extend(u32::try_from(name.len()).map_err(io::Error::other)?.to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend(name.as_bytes());
    body.push(0);
    found(notify(fuse, NOTIFY_INVAL_ENTRY, &body)).map(drop)
}

/// Returns those of the inodes that the kernel has in memory: the file is open or mapped by any process, or its name is
/// cached.
///
/// # Errors
/// Returns an error if a write fails.
pub fn cached_inodes(fuse: impl AsFd, inodes: &[u64]) -> io::Result<Vec<u64>> {
    let mut known = Vec::new();
    for &inode in inodes {
        if is_inode_in_memory(&fuse, inode)? {
            known.push(inode);
        }
    }
    Ok(known)
}

fn is_inode_in_memory(fuse: impl AsFd, inode: u64) -> io::Result<bool> {
    // struct fuse_notify_inval_inode_out: u64 ino, i64 off, i64 len. A negative offset leaves the page cache alone.
    let mut body = inode.to_ne_bytes().to_vec();
    body.extend((-1i64).to_ne_bytes());
    body.extend(0i64.to_ne_bytes());
    found(notify(fuse, NOTIFY_INVAL_INODE, &body))
}

/// Converts the result of a notification: the kernel returns ENOENT for an inode or name that it does not have in
/// memory.
fn found(notified: io::Result<()>) -> io::Result<bool> {
    match notified {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn notify(fuse: impl AsFd, code: i32, body: &[u8]) -> io::Result<()> {
    // struct fuse_out_header: u32 len, i32 error (here the notification code), u64 unique = 0.
    let mut notice = u32::try_from(16 + body.len()).map_err(io::Error::other)?.to_ne_bytes().to_vec();
    notice.extend(code.to_ne_bytes());
    notice.extend([0; 8]);
    notice.extend(body);
    write_reply(fuse, &notice)
}

/// Returns true if the connection has ended: its superblock was destroyed, or it was aborted.
pub fn is_over(fuse: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fuse, PollFlags::empty())];
    matches!(poll_for(&mut fds, Some(Duration::ZERO)), Ok(1)) && fds[0].revents().contains(PollFlags::ERR)
}

/// Registers a file as passthrough backing of the connection and returns the backing id, which belongs to the
/// connection and survives the process.
///
/// # Errors
/// Returns `EPERM` without `CAP_SYS_ADMIN` or if passthrough was not negotiated in INIT, and `ELOOP` if the file is on
/// a stacked file system.
pub fn backing_open(fuse: impl AsFd, file: impl AsFd) -> io::Result<u32> {
    let map = BackingMap { fd: file.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: both descriptors are open for the length of the call; the kernel reads 16 bytes from `map`, which has
    // the layout of struct fuse_backing_map, and writes nothing.
    let id = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), IOC_BACKING_OPEN, &raw const map) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

/// Releases a backing id. Open files and mappings keep their reference to the backing file.
///
/// # Errors
/// Returns `ENOENT` for an unknown id.
pub fn backing_close(fuse: impl AsFd, id: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call; the kernel reads 4 bytes from `id`.
    let result = unsafe { libc::ioctl(fuse.as_fd().as_raw_fd(), IOC_BACKING_CLOSE, &raw const id) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the descriptor number of `target` refer to the open file of `source`, close-on-exec (dup3(2)). The owner of
/// `target` keeps the number; the previous open file is closed.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn replace_descriptor(target: BorrowedFd<'_>, source: impl AsFd) -> io::Result<()> {
    loop {
        // SAFETY: both numbers are open descriptors for the length of the call, and dup3 accesses no memory. The owner
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
    use crate::sys::fuse::device::*;
    use std::io::{Read, Seek, SeekFrom, Write};

    #[test]
    fn replaced_descriptor_keeps_its_number() {
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
    fn reads_the_connection_from_fdinfo() {
        assert_eq!(parse_connection("pos:\t0\nflags:\t02\nfuse_connection:\t58\n").unwrap(), Some(58));
        assert_eq!(parse_connection("pos:\t0\n").unwrap(), None, "kernel without fuse_connection");
        assert!(parse_connection("fuse_connection:\tx").is_err());
        assert!(connection_of(tempfile::tempfile().unwrap()).is_err());
    }
}
