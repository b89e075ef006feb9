//! `stencil-mountd attempt`: enters the sandbox of a server, then tries a forbidden operation. Demonstrates on a host
//! that the sandbox is effective there, and lets tests compare inside and outside.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use stencilfs::error::{Error, Result};
use stencilfs::sys::attempt;

const USAGE: &str = "\
usage: stencil-mountd attempt [--store DIR] WHAT [TARGET]     try an operation; with --store in the sandbox of a server
       stencil-mountd attempt calls                          list the system calls that a server may make
       stencil-mountd attempt without landlock|seccomp CMD…   run a command as on a kernel without that feature";

/// Runs the command. Exit status 0: the operation succeeded; 1: it was refused, and standard output has the errno.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let outcome = run(&args.collect::<Vec<_>>());
    match outcome {
        Ok(code) => code,
        Err(error) => {
            stencilfs::say!("stencil-mountd: {error}");
            ExitCode::from(error.code().exit_code())
        }
    }
}

fn run(args: &[OsString]) -> Result<ExitCode> {
    let words: Vec<&OsStr> = args.iter().map(OsString::as_os_str).collect();
    let (store, words) = match &words[..] {
        [flag, store, rest @ ..] if *flag == "--store" => (Some(Path::new(store)), rest),
        rest => (None, rest),
    };
    let (what, target) = match words {
        [what] if *what == "calls" => {
            super::CALLS.iter().for_each(|call| crate::output::print_line(&call.row().to_string()));
            return Ok(ExitCode::SUCCESS);
        }
        [what, feature, program, args @ ..] if *what == "without" => {
            return without(feature, program, args);
        }
        [what] => (what.to_str().unwrap_or_default(), OsStr::new("")),
        [what, target] => (what.to_str().unwrap_or_default(), *target),
        _ => return Err(usage()),
    };
    if let Some(store) = store {
        super::enter(store)?;
    }
    let tried = attempt(what, Path::new(target)).ok_or_else(usage)?;
    Ok(match tried {
        Ok(()) => {
            crate::output::print_line(&format!("{what}: done"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            crate::output::print_line(&format!("{what}: {}", name(&error)));
            ExitCode::FAILURE
        }
    })
}

fn usage() -> Error {
    Error::usage(format!("unknown operation\n{USAGE}"))
}

/// Tries an operation and returns its result; `None` for an unknown operation.
fn attempt(what: &str, target: &Path) -> Option<io::Result<()>> {
    let pid = || target.to_str().and_then(|t| t.parse().ok()).unwrap_or(0);
    Some(match what {
        "execve" => attempt::execve(target),
        "fork" => attempt::fork(),
        "thread" => std::thread::Builder::new().spawn(|| ()).map(|t| drop(t.join())),
        "clone3" => attempt::clone3(),
        "ptrace" => attempt::ptrace(pid()),
        "process_vm_readv" => attempt::process_vm_readv(pid()),
        "kill" => attempt::kill(pid(), libc::SIGTERM),
        "tgkill" => attempt::tgkill(pid(), libc::SIGTERM),
        "set_owner" => attempt::set_owner(pid()),
        "pidfd_open" => attempt::pidfd_open(pid()),
        "socket_inet" => attempt::socket(libc::AF_INET),
        "socket_unix" => attempt::socket(libc::AF_UNIX),
        "socket_netlink" => attempt::socket(libc::AF_NETLINK),
        "mount" => attempt::mount(target),
        "unshare" => attempt::unshare(),
        "bpf" => attempt::bpf(),
        "io_uring" => attempt::io_uring(),
        "userfaultfd" => attempt::userfaultfd(),
        "map_code" => attempt::map_code(),
        "setuid" => attempt::setuid(pid()),
        "chmod" => attempt::chmod(target),
        "unlink" => attempt::unlink(target),
        "read" => attempt::open_read(target),
        "write" => attempt::open_write(target),
        "create" => attempt::create(target),
        "tmpfile" => attempt::tmpfile(target),
        "memfd" => attempt::memfd(),
        _ => return None,
    })
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

/// Runs a command with a filter that returns ENOSYS for the system calls of a feature, as a kernel without it does.
fn without(feature: &OsStr, program: &OsStr, args: &[&OsStr]) -> Result<ExitCode> {
    let calls: &[libc::c_long] = match feature.to_str() {
        Some("landlock") => &[
            libc::SYS_landlock_create_ruleset,
            libc::SYS_landlock_add_rule,
            libc::SYS_landlock_restrict_self,
        ],
        Some("seccomp") => &[libc::SYS_seccomp],
        _ => return Err(usage()),
    };
    let fail = |e: &dyn std::fmt::Display| Error::failed(format!("cannot hide the feature: {e}"));
    let rules: BTreeMap<i64, _> = calls.iter().map(|&call| (call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().map_err(|e| fail(&e))?;
    let enosys = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, enosys, arch).map_err(|e| fail(&e))?;
    let filter = BpfProgram::try_from(filter).map_err(|e| fail(&e))?;
    seccompiler::apply_filter(&filter).map_err(|e| fail(&e))?;
    let program = PathBuf::from(program);
    Err(Error::io("cannot run", &program, Command::new(&program).args(args).exec()))
}
