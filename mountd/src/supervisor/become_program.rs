//! Replaces the program of the supervisor by execve(2). The new program inherits all descriptors of the mount.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use stencilfs::control::Channel;
use stencilfs::error::Error;
use stencilfs::json_log;
use stencilfs::sys::files::descriptor;
use stencilfs::sys::process;

use super::machine::Backings;
use super::program::Program;
use super::resources::Resources;
use crate::protocol::named_fds;

/// Executes `stencil-mountd resume` from `program` in this process; the new program continues with the mount. Returns
/// only on failure.
pub fn exec(
    program: &Program,
    previous: &Program,
    resources: &Resources,
    link: Option<&Channel>,
    caller: Option<BorrowedFd<'_>>,
    backings: &Backings,
    mountpoint: &Path,
) -> Error {
    let mut named: Vec<(&str, BorrowedFd<'_>)> = vec![
        ("fuse", resources.fuse.as_fd()),
        ("ledger", resources.ledger.as_fd()),
        ("counters", resources.stats.page().fd().as_fd()),
        ("record", resources.record.folder()),
        ("listener", resources.listener.as_fd()),
        ("previous", previous.file.as_fd()),
        ("program", program.file.as_fd()),
    ];
    named.extend(link.map(|link| ("peer", link.as_fd())));
    named.extend(caller.map(|channel| ("caller", channel)));
    named.extend(backings.files().map(|file| ("backing", file.as_fd())));
    let error = exec_with(program, &named, mountpoint).unwrap_or_else(|e| e);
    let error = Error::io("cannot execute the new program", &program.path, error);
    log::error!("{error}");
    error
}

fn exec_with(
    program: &Program,
    named: &[(&str, BorrowedFd<'_>)],
    mountpoint: &Path,
) -> io::Result<io::Error> {
    let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
    command.arg0("stencil-mountd").arg("resume").arg(named_fds::argument(named)).arg("--").arg(mountpoint);
    command.env(json_log::VARIABLE, json_log::format().name());
    // Signals stay blocked across execve(2) and are handled by the new program.
    process::block_signals(true)?;
    let error = match named.iter().try_for_each(|(_, fd)| descriptor::clear_cloexec(fd).map(drop)) {
        Ok(()) => command.exec(),
        Err(error) => error,
    };
    // The supervisor continues: servers must not inherit these descriptors.
    for (_, fd) in named {
        descriptor::set_cloexec(fd)?;
    }
    process::block_signals(false)?;
    Ok(error)
}
