//! Operations that a confined process must not be able to do. Each is a real system call with arguments that succeed,
//! or fail with a distinctive errno, where the operation is allowed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Closes the descriptor that a system call returned.
fn created(result: libc::c_long) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "the kernel's descriptors are of type int")]
    let fd = check(result)? as i32;
    // SAFETY: the call succeeded, so this is a new descriptor without an owner.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// Executes another program. Returns only on failure.
///
/// # Errors
/// Always returns the error of execve(2).
pub fn execve(program: &Path) -> io::Result<()> {
    let program = path(program)?;
    let arguments = [program.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: path, arguments and environment are NUL-terminated and outlive the call.
    check(unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) }.into())
        .map(drop)
}

/// Forks a child that exits immediately.
///
/// # Errors
/// Returns the error of the system call.
pub fn fork() -> io::Result<()> {
    // SAFETY: the child only exits.
    let pid = check(unsafe { libc::fork() }.into())?;
    if pid == 0 {
        super::process::leave(0);
    }
    super::process::reap_one().map_err(io::Error::other).map(drop)
}

/// Calls clone3(2), whose flags lie in memory where a seccomp filter cannot read them.
///
/// # Errors
/// Returns the error of the system call; `EINVAL` if the call is allowed, because the argument is null.
pub fn clone3() -> io::Result<()> {
    // SAFETY: the kernel rejects a null argument of length 0 before it creates anything.
    check(unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }).map(drop)
}

/// Attaches to a process with `PTRACE_SEIZE`.
///
/// # Errors
/// Returns the error of the system call.
pub fn ptrace(pid: u32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE accesses no memory of this process.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid.cast_signed(), 0, 0) }).map(drop)
}

/// Reads the memory of another process.
///
/// # Errors
/// Returns the error of the system call; `EFAULT` if the call is allowed, because nothing is mapped at that address.
pub fn process_vm_readv(pid: u32) -> io::Result<()> {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
    // SAFETY: one local byte is writable for the length of the call; the remote address is only resolved in the other
    // process.
    let got =
        unsafe { libc::process_vm_readv(pid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
    check(got as libc::c_long).map(drop)
}

/// Sends a signal to another process.
///
/// # Errors
/// Returns the error of the system call.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: kill accesses no memory.
    check(unsafe { libc::kill(pid.cast_signed(), signal) }.into()).map(drop)
}

/// Sends a signal to a thread of another process.
///
/// # Errors
/// Returns the error of the system call.
pub fn tgkill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: tgkill accesses no memory.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, signal) }).map(drop)
}

/// Opens a pidfd of another process.
///
/// # Errors
/// Returns the error of the system call.
pub fn pidfd_open(pid: u32) -> io::Result<()> {
    // SAFETY: pidfd_open accesses no memory.
    created(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Creates a socket of an address family.
///
/// # Errors
/// Returns the error of the system call.
pub fn socket(family: i32) -> io::Result<()> {
    let kind = if family == libc::AF_NETLINK { libc::SOCK_RAW } else { libc::SOCK_STREAM };
    // SAFETY: socket accesses no memory.
    created(unsafe { libc::socket(family, kind, 0) }.into())
}

/// Mounts an empty tmpfs.
///
/// # Errors
/// Returns the error of the system call.
pub fn mount(target: &Path) -> io::Result<()> {
    let target = path(target)?;
    // SAFETY: all strings are NUL-terminated and outlive the call; a tmpfs needs no mount data.
    let result =
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    check(result.into()).map(drop)
}

/// Creates a BPF map.
///
/// # Errors
/// Returns the error of the system call.
pub fn bpf() -> io::Result<()> {
    // union bpf_attr for BPF_MAP_CREATE: map type (2 = array), key size, value size, maximum number of entries.
    let attributes: [u32; 4] = [2, 4, 8, 1];
    // SAFETY: the kernel reads exactly the 16 bytes of `attributes`.
    created(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// Creates a new mount namespace with unshare(2).
///
/// # Errors
/// Returns the error of the system call.
pub fn unshare() -> io::Result<()> {
    // SAFETY: unshare of the mount namespace accesses no memory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}

/// Calls io_uring_setup(2): operations through an io_uring bypass seccomp filters.
///
/// # Errors
/// Returns the error of the system call; `EFAULT` if the call is allowed, because the argument is null.
pub fn io_uring() -> io::Result<()> {
    // SAFETY: the kernel rejects a null argument with EFAULT before it creates anything.
    created(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, 0) })
}

/// Creates a userfaultfd.
///
/// # Errors
/// Returns the error of the system call.
pub fn userfaultfd() -> io::Result<()> {
    // SAFETY: userfaultfd accesses no memory.
    created(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })
}

/// Maps executable memory.
///
/// # Errors
/// Returns the error of the system call.
pub fn map_code() -> io::Result<()> {
    let (length, flags) = (4096, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping at an address that the kernel chooses overlaps no memory of this process; the
    // mapping is removed with the same length, and nothing refers to its memory.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        check(libc::munmap(at, length).into()).map(drop)
    }
}

/// Sets all user ids to `uid` with setresuid(2).
///
/// # Errors
/// Returns the error of the system call.
pub fn setuid(uid: u32) -> io::Result<()> {
    // SAFETY: setresuid accesses no memory.
    check(unsafe { libc::setresuid(uid, uid, uid) }.into()).map(drop)
}

/// Changes the mode of a file.
///
/// # Errors
/// Returns the error of the system call.
pub fn chmod(file: &Path) -> io::Result<()> {
    let file = path(file)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::chmod(file.as_ptr(), 0o600) }.into()).map(drop)
}

/// Removes a file.
///
/// # Errors
/// Returns the error of the system call.
pub fn unlink(file: &Path) -> io::Result<()> {
    let file = path(file)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::unlink(file.as_ptr()) }.into()).map(drop)
}

/// Opens a file for reading.
///
/// # Errors
/// Returns the error of the system call.
pub fn open_read(file: &Path) -> io::Result<()> {
    std::fs::File::open(file).map(drop)
}

/// Opens an existing file for writing.
///
/// # Errors
/// Returns the error of the system call.
pub fn open_write(file: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).open(file).map(drop)
}

/// Creates a file.
///
/// # Errors
/// Returns the error of the system call.
pub fn create(file: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).create_new(true).open(file).map(drop)
}

/// Creates an unnamed file with `O_TMPFILE`.
///
/// # Errors
/// Returns the error of the system call.
pub fn tmpfile(directory: &Path) -> io::Result<()> {
    std::fs::File::options().write(true).custom_flags(libc::O_TMPFILE).open(directory).map(drop)
}

/// Creates a memfd.
///
/// # Errors
/// Returns the error of the system call.
pub fn memfd() -> io::Result<()> {
    // SAFETY: the name is NUL-terminated and outlives the call.
    created(unsafe { libc::memfd_create(c"attempt".as_ptr(), libc::MFD_CLOEXEC) }.into())
}

/// Makes another process the receiver of the signals of a descriptor (`F_SETOWN`).
///
/// # Errors
/// Returns the error of the system call.
pub fn set_owner(pid: u32) -> io::Result<()> {
    let null = std::fs::File::open("/dev/null").or_else(|_| std::fs::File::open("/"));
    let number = null.as_ref().map_or(0, AsRawFd::as_raw_fd);
    // SAFETY: the number is an open descriptor, or 0, which fcntl rejects if it is closed; no memory is accessed.
    check(unsafe { libc::fcntl(number, libc::F_SETOWN, pid.cast_signed()) }.into()).map(drop)
}
