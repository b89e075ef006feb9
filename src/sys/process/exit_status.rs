//! Exit status of any process, not only of children.
//!
//! Since Linux 6.15 a pidfd that was opened before its process was reaped provides the exit status (`PIDFD_INFO_EXIT`
//! of `PIDFD_GET_INFO`, see ioctl_pidfd(2)). Before it is reaped, the process is a zombie with its status in
//! `/proc/PID/stat`.

use std::os::fd::{AsFd, AsRawFd};

use crate::sys::process::ProcessId;
use crate::sys::process::procfs;

/// `PIDFD_INFO_EXIT` of `linux/pidfd.h`.
const INFO_EXIT: u64 = 1 << 3;

/// `_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)` of `linux/pidfd.h`, for the first version of the structure.
const GET_INFO: libc::c_ulong =
    (3 << 30) | ((size_of::<PidfdInfo>() as libc::c_ulong) << 16) | (0xff << 8) | 11;

/// The first version of `struct pidfd_info`, 64 bytes. Later kernels also fill it.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// How a process terminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// The process exited with this code.
    Code(u8),
    /// This signal terminated the process.
    Signal(u8),
}

impl ExitStatus {
    /// Decodes a wait(2) status.
    fn of(status: i32) -> ExitStatus {
        let [low, code, ..] = status.to_le_bytes();
        match low & 0x7f {
            0 => ExitStatus::Code(code),
            signal => ExitStatus::Signal(signal),
        }
    }

    /// Reads the exit status of the process of `pidfd`. Returns `None` while the process lives, and for a reaped
    /// process before Linux 6.15.
    pub fn read(process: ProcessId, pidfd: impl AsFd) -> Option<ExitStatus> {
        // The process may be reaped between the first two calls; the pidfd has its status then.
        of_reaped(&pidfd).or_else(|| of_zombie(process)).or_else(|| of_reaped(&pidfd))
    }
}

fn of_reaped(pidfd: impl AsFd) -> Option<ExitStatus> {
    let mut info = PidfdInfo { mask: INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the kernel writes at most the number of bytes that is part of GET_INFO, which is the size of `info`.
    let result = unsafe { libc::ioctl(pidfd.as_fd().as_raw_fd(), GET_INFO, &raw mut info) };
    (result == 0 && info.mask & INFO_EXIT != 0).then(|| ExitStatus::of(info.exit_code))
}

fn of_zombie(process: ProcessId) -> Option<ExitStatus> {
    let status = procfs::exit_status_of_zombie(process.pid)?;
    // The identity is checked after the read: the pid has not been reused in the meantime.
    (ProcessId::of(process.pid).ok()?? == process).then(|| ExitStatus::of(status))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use crate::sys::process::exit_status::*;
    use crate::sys::process::pidfd;

    #[test]
    fn reads_status_of_reaped_processes() {
        for (script, status) in [
            ("exit 0", ExitStatus::Code(0)),
            ("exit 37", ExitStatus::Code(37)),
            ("kill -KILL $$", ExitStatus::Signal(9)),
            ("ulimit -c 0; kill -ABRT $$", ExitStatus::Signal(6)),
        ] {
            let mut child = Command::new("sh")
                .args(["-c", &format!("read x; {script}")])
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let process = ProcessId::of(child.id()).unwrap().unwrap();
            let fd = pidfd(child.id()).unwrap().unwrap();
            assert_eq!(ExitStatus::read(process, &fd), None, "alive: {script}");
            drop(child.stdin.take());
            child.wait().unwrap();
            assert_eq!(ExitStatus::read(process, &fd), Some(status), "reaped: {script}");
        }
    }
}
