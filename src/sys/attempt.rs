//! What a confined process must not be able to do, done in earnest: each with arguments that work where it is allowed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

fn outcome(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Takes a descriptor that a system call has just made, and closes it.
fn made(result: libc::c_long) -> io::Result<()> {
    let fd = outcome(result)?;
    // SAFETY: the call has succeeded: this is a new descriptor that nothing else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

/// Becomes another program. Returns only where that is refused.
///
/// # Errors
/// Always: why it could not.
pub fn execve(program: &Path) -> io::Result<()> {
    let program = path(program)?;
    let arguments = [program.as_ptr(), std::ptr::null()];
    let nothing = [std::ptr::null()];
    // SAFETY: path, arguments and environment are NUL-terminated and outlive the call.
    outcome(unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), nothing.as_ptr()) }.into()).map(drop)
}

/// Forks; the child ends at once.
///
/// # Errors
/// Why it could not.
pub fn fork() -> io::Result<()> {
    // SAFETY: the child does nothing but end.
    let pid = outcome(unsafe { libc::fork() }.into())?;
    if pid == 0 {
        super::process::leave(0);
    }
    super::process::reap_one().map_err(io::Error::other).map(drop)
}

/// Makes a thread or process by clone3(2), which no filter can look into.
///
/// # Errors
/// Why it could not; `EINVAL` where it would be allowed, since the argument says nothing.
pub fn clone3() -> io::Result<()> {
    // SAFETY: a null argument of length 0 is refused by the kernel before it makes anything.
    outcome(unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }).map(drop)
}

/// Attaches to a process as a debugger.
///
/// # Errors
/// Why it could not.
pub fn ptrace(pid: u32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE takes no memory of ours.
    outcome(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid as libc::pid_t, 0, 0) }).map(drop)
}

/// Reads memory of another process.
///
/// # Errors
/// Why it could not; `EFAULT` where it is allowed, since nothing lies at that address.
pub fn process_vm_readv(pid: u32) -> io::Result<()> {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
    // SAFETY: one local byte is writable for the length of the call; the remote address is only ever looked up in the
    // other process.
    let got =
        unsafe { libc::process_vm_readv(pid as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) };
    outcome(got as libc::c_long).map(drop)
}

/// Signals another process.
///
/// # Errors
/// Why it could not.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: kill touches no memory.
    outcome(unsafe { libc::kill(pid as libc::pid_t, signal) }.into()).map(drop)
}

/// Signals a thread of another process.
///
/// # Errors
/// Why it could not.
pub fn tgkill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: tgkill touches no memory.
    outcome(unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, signal) }).map(drop)
}

/// Makes a descriptor of another process.
///
/// # Errors
/// Why it could not.
pub fn pidfd_open(pid: u32) -> io::Result<()> {
    // SAFETY: pidfd_open touches no memory.
    made(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Makes a socket.
///
/// # Errors
/// Why it could not.
pub fn socket(family: i32) -> io::Result<()> {
    let kind = if family == libc::AF_NETLINK { libc::SOCK_RAW } else { libc::SOCK_STREAM };
    // SAFETY: socket touches no memory.
    made(unsafe { libc::socket(family, kind, 0) }.into())
}

/// Mounts an empty tmpfs.
///
/// # Errors
/// Why it could not.
pub fn mount(target: &Path) -> io::Result<()> {
    let target = path(target)?;
    // SAFETY: all strings are NUL-terminated and outlive the call; tmpfs needs no data.
    let result =
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    outcome(result.into()).map(drop)
}

/// Makes a BPF map.
///
/// # Errors
/// Why it could not.
pub fn bpf() -> io::Result<()> {
    // union bpf_attr of BPF_MAP_CREATE: type (2 = array), key size, value size, entries.
    let attributes: [u32; 4] = [2, 4, 8, 1];
    // SAFETY: the kernel reads exactly the 16 bytes of `attributes`.
    made(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// Leaves the mount namespace.
///
/// # Errors
/// Why it could not.
pub fn unshare() -> io::Result<()> {
    // SAFETY: unshare of the mount namespace touches no memory.
    outcome(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

/// Makes an io_uring: calls through it pass by every filter.
///
/// # Errors
/// Why it could not; `EFAULT` where it is allowed, since the argument is null.
pub fn io_uring() -> io::Result<()> {
    // SAFETY: a null argument is refused with EFAULT before anything is made.
    made(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, 0) })
}

/// Makes a descriptor that handles page faults.
///
/// # Errors
/// Why it could not.
pub fn userfaultfd() -> io::Result<()> {
    // SAFETY: userfaultfd touches no memory.
    made(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
}

/// Maps memory that can hold a program.
///
/// # Errors
/// Why it could not.
pub fn map_code() -> io::Result<()> {
    let (length, flags) = (4096, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of ours; it is unmapped
    // again with the same length, and nothing ever refers into it.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        outcome(libc::munmap(at, length).into()).map(drop)
    }
}

/// Becomes root.
///
/// # Errors
/// Why it could not.
pub fn setuid(uid: u32) -> io::Result<()> {
    // SAFETY: setresuid touches no memory.
    outcome(unsafe { libc::setresuid(uid, uid, uid) }.into()).map(drop)
}

/// Changes the mode of a file.
///
/// # Errors
/// Why it could not.
pub fn chmod(file: &Path) -> io::Result<()> {
    let file = path(file)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    outcome(unsafe { libc::chmod(file.as_ptr(), 0o600) }.into()).map(drop)
}

/// Removes a file.
///
/// # Errors
/// Why it could not.
pub fn unlink(file: &Path) -> io::Result<()> {
    let file = path(file)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    outcome(unsafe { libc::unlink(file.as_ptr()) }.into()).map(drop)
}

/// Opens a file for reading.
///
/// # Errors
/// Why it could not.
pub fn open_read(file: &Path) -> io::Result<()> {
    std::fs::File::open(file).map(drop)
}

/// Opens a file that exists for writing.
///
/// # Errors
/// Why it could not.
pub fn open_write(file: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).open(file).map(drop)
}

/// Makes a new file.
///
/// # Errors
/// Why it could not.
pub fn create(file: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).create_new(true).open(file).map(drop)
}

/// Makes a file without a name.
///
/// # Errors
/// Why it could not.
pub fn tmpfile(folder: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).custom_flags(libc::O_TMPFILE).open(folder).map(drop)
}

/// Makes a file in memory.
///
/// # Errors
/// Why it could not.
pub fn memfd() -> io::Result<()> {
    // SAFETY: the name is NUL-terminated and outlives the call.
    made(unsafe { libc::memfd_create(c"attempt".as_ptr(), libc::MFD_CLOEXEC) }.into())
}

/// Has the kernel send signals for a descriptor to another process.
///
/// # Errors
/// Why it could not.
pub fn set_owner(pid: u32) -> io::Result<()> {
    let null = std::fs::File::open("/dev/null").or_else(|_| std::fs::File::open("/"));
    let number = null.as_ref().map_or(0, AsRawFd::as_raw_fd);
    // SAFETY: the number is an open descriptor, or 0, which fcntl refuses where it is none; no memory is touched.
    outcome(unsafe { libc::fcntl(number, libc::F_SETOWN, pid as libc::c_int) }.into()).map(drop)
}
