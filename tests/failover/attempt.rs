//! Operations that a confined process must not be able to do. Each is a real system call with arguments that succeed,
//! or fail with a distinctive errno, where the operation is allowed; a child of the test enters the sandbox with the
//! code of the server, and then makes the call.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

#[path = "../../mountd/src/server/sandbox/mod.rs"]
pub mod sandbox;

/// The sandbox that a child enters.
pub struct Sandbox {
    /// The store of the server.
    pub store: PathBuf,
    /// True if a forbidden system call kills the child.
    pub kill: bool,
}

/// The end of an attempt.
pub struct Outcome {
    /// `done`, or the name of an errno, or empty if the child was killed.
    pub result: String,
    /// The signal that killed the child.
    pub signal: Option<i32>,
}

/// Makes a system call. A child that the call has created exits immediately.
fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: callers pass numbers, null, and pointers to memory that outlives the call and that the system call only
    // reads; none of the calls below creates a mapping over memory of this process or unmaps memory.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as usize),
    }
}

/// Tries an operation on `object`, a path or the PID of another process.
fn operation(what: &str, object: &str) -> io::Result<()> {
    let path = CString::new(object)?;
    let path = path.as_ptr() as usize;
    let pid: usize = object.parse().unwrap_or(0);
    let (number, arguments): (_, &[usize]) = match what {
        // The command of the child is the program that is executed.
        "execve" => return Ok(()),
        "thread" => return std::thread::Builder::new().spawn(|| ()).map(|thread| drop(thread.join())),
        "read" => return File::open(object).map(drop),
        "write" => return File::options().write(true).open(object).map(drop),
        "create" => return File::options().write(true).create_new(true).open(object).map(drop),
        "tmpfile" => {
            return File::options().write(true).custom_flags(libc::O_TMPFILE).open(object).map(drop);
        }
        "fork" => {
            if call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])? == 0 {
                call(libc::SYS_exit_group, [0; 6])?;
            }
            rustix::process::wait(rustix::process::WaitOptions::empty())?;
            return Ok(());
        }
        // The flags of clone3 lie in memory, where a seccomp filter cannot read them; null of length 0 is EINVAL.
        "clone3" => (libc::SYS_clone3, &[]),
        "ptrace" => (libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, pid]),
        // The call reads from the address null of the other process, and fails with EFAULT before it uses the local
        // address.
        "process_vm_readv" => {
            let local = libc::iovec { iov_base: std::ptr::dangling_mut(), iov_len: 1 };
            let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
            let (local, remote) = (&raw const local as usize, &raw const remote as usize);
            return call(libc::SYS_process_vm_readv, [pid, local, 1, remote, 1, 0]).map(drop);
        }
        "kill" => (libc::SYS_kill, &[pid, libc::SIGTERM as usize]),
        "tgkill" => (libc::SYS_tgkill, &[pid, pid, libc::SIGTERM as usize]),
        // The other process would receive the signals about standard input.
        "set_owner" => (libc::SYS_fcntl, &[0, libc::F_SETOWN as usize, pid]),
        "pidfd_open" => (libc::SYS_pidfd_open, &[pid]),
        "socket_inet" => (libc::SYS_socket, &[libc::AF_INET as usize, libc::SOCK_STREAM as usize]),
        "socket_unix" => (libc::SYS_socket, &[libc::AF_UNIX as usize, libc::SOCK_STREAM as usize]),
        "socket_netlink" => (libc::SYS_socket, &[libc::AF_NETLINK as usize, libc::SOCK_RAW as usize]),
        "mount" => (libc::SYS_mount, &[c"none".as_ptr() as usize, path, c"tmpfs".as_ptr() as usize]),
        "unshare" => (libc::SYS_unshare, &[libc::CLONE_NEWNS as usize]),
        "bpf" => {
            // union bpf_attr for BPF_MAP_CREATE: map type (2 = array), key size, value size, maximum number of entries.
            let attributes: [u32; 4] = [2, 4, 8, 1];
            let at = attributes.as_ptr() as usize;
            return call(libc::SYS_bpf, [0, at, size_of_val(&attributes), 0, 0, 0]).map(drop);
        }
        // Operations through an io_uring bypass seccomp filters; the null argument is EFAULT.
        "io_uring" => (libc::SYS_io_uring_setup, &[1]),
        "userfaultfd" => (libc::SYS_userfaultfd, &[libc::O_CLOEXEC as usize]),
        "map_code" => {
            let (access, flags) =
                (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            (libc::SYS_mmap, &[0, 4096, access as usize, flags as usize, usize::MAX])
        }
        "setuid" => (libc::SYS_setresuid, &[pid; 3]),
        "chmod" => (libc::SYS_fchmodat, &[libc::AT_FDCWD as usize, path, 0o600]),
        "unlink" => (libc::SYS_unlinkat, &[libc::AT_FDCWD as usize, path]),
        "memfd" => (libc::SYS_memfd_create, &[c"attempt".as_ptr() as usize, libc::MFD_CLOEXEC as usize]),
        _ => panic!("unknown operation {what}"),
    };
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    call(number, all).map(drop)
}

/// Tries an operation in a child, which is made to lack a kernel feature and enters a sandbox first.
pub fn attempt(
    lacking: Option<&str>,
    inside: Option<Sandbox>,
    what: &'static str,
    object: String,
) -> Outcome {
    let mut command = Command::new("/bin/true");
    command.stdin(Stdio::null());
    if let Some(feature) = lacking {
        hide(&mut command, feature);
    }
    let child = move || {
        if let Some(Sandbox { store, kill }) = &inside {
            let refused = if *kill { c"kill" } else { c"" };
            // SAFETY: the child has one thread, and both strings are NUL-terminated. std's lock on the environment is
            // held since before the fork.
            unsafe { libc::setenv(c"STENCIL_SECCOMP".as_ptr(), refused.as_ptr(), 1) };
            if let Err(error) = sandbox::enter(store) {
                eprintln!("{error}");
                std::process::abort();
            }
        }
        operation(what, &object)?;
        if what != "execve" {
            call(libc::SYS_exit_group, [0; 6])?;
        }
        Ok(())
    };
    // SAFETY: the child of this process has one thread. It allocates, which the C library allows after fork(2), and
    // takes no lock that another thread of this process may have held, except for reading the environment.
    unsafe { command.pre_exec(child) };
    match command.spawn() {
        Ok(mut child) => {
            let signal = child.wait().unwrap().signal();
            Outcome { result: signal.map_or("done", |_| "").to_owned(), signal }
        }
        Err(error) => Outcome { result: name(&error), signal: None },
    }
}

fn name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM".to_owned(),
        Some(libc::EACCES) => "EACCES".to_owned(),
        Some(libc::ENOSYS) => "ENOSYS".to_owned(),
        Some(libc::EFAULT) => "EFAULT".to_owned(),
        Some(libc::EINVAL) => "EINVAL".to_owned(),
        _ => error.to_string(),
    }
}

/// Makes a command run with a filter that returns ENOSYS for the system calls of a feature, as a kernel without it
/// does.
pub fn hide(command: &mut Command, feature: &str) {
    let calls: &[libc::c_long] = match feature {
        "landlock" => &[
            libc::SYS_landlock_create_ruleset,
            libc::SYS_landlock_add_rule,
            libc::SYS_landlock_restrict_self,
        ],
        "seccomp" => &[libc::SYS_seccomp],
        _ => panic!("unknown feature {feature}"),
    };
    let rules: BTreeMap<i64, _> = calls.iter().map(|&call| (call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let enosys = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, enosys, arch).unwrap();
    let filter = BpfProgram::try_from(filter).unwrap();
    // SAFETY: the child makes two system calls.
    unsafe { command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(io::Error::other)) };
}
