//! The sandbox of a server, entered before the server reads data that another user may have written; see
//! docs/explanation/security.md.
//!
//! ```text
//!   inherited descriptors, memory, sockets ── created before ──┐
//!                                                              ▼  one thread, no byte of the store read yet
//!   no_new_privs → no capabilities, uid of the store's owner → Landlock: store, read-only → seccomp: list of calls
//! ```
//! No step can be undone, neither by the server nor by an attacker who has taken control of the server. A step that the
//! kernel does not support is reported and skipped, so that a mount works on hosts without Landlock too.

pub mod calls;
mod files;
mod privileges;

use std::path::Path;

use stencilfs::error::{Error, Result};
use stencilfs::sys::clock;

use calls::Refused;

/// Environment variable for forbidden system calls: `kill` kills the server, `eperm` (the default) fails the call.
pub const VARIABLE: &str = "STENCIL_SECCOMP";

/// Enters the sandbox: from here on this process can read the store and use its open descriptors, nothing else. Returns
/// (and logs) the parts that this kernel does not support, as text.
///
/// # Errors
/// Returns an error if there are other threads (which would stay outside), if the store's owner cannot reach the store,
/// or if a step fails that this kernel supports.
pub fn enter(store: &Path) -> Result<Vec<String>> {
    privileges::expect_one_thread()?;
    confine(store)
}

/// Confines the calling thread, and the threads that it starts later.
fn confine(store: &Path) -> Result<Vec<String>> {
    let refused = refused(std::env::var_os(VARIABLE).as_deref())?;
    // Each function makes system calls once that are not on the list, and caches the results: CPU features and the time
    // namespace.
    let _ = (rustix::param::page_size(), clock::monotonic());
    // The rules are made before the uid changes. If the store's owner may not search a directory above the store, this
    // step then succeeds, and `expect_readable` reports the directory with a hint.
    let rules = files::rules(store)?;
    let mut lacks = Vec::new();
    privileges::give_up(store, &mut lacks)?;
    files::restrict(rules, &mut lacks)?;
    files::expect_readable(store)?;
    filter(refused, &mut lacks)?;
    for lack in &lacks {
        log::warn!("the server's sandbox is incomplete: {lack}");
    }
    Ok(lacks)
}

fn refused(word: Option<&std::ffi::OsStr>) -> Result<Refused> {
    match word.map(|w| w.to_str().unwrap_or("?")) {
        None | Some("" | "eperm") => Ok(Refused::Eperm),
        Some("kill") => Ok(Refused::Kill),
        Some(other) => {
            Err(Error::usage(format!("invalid value '{other}' of {VARIABLE}: expected kill or eperm"))
                .hint(format!("unset {VARIABLE}")))
        }
    }
}

/// Installs the system call filter. This is the last step, as its own system calls are not on the list.
fn filter(refused: Refused, lacks: &mut Vec<String>) -> Result<()> {
    let Some(programs) = calls::programs(refused)? else {
        lacks.push(format!("the system call filter does not support {} processors", std::env::consts::ARCH));
        return Ok(());
    };
    for program in programs {
        match seccompiler::apply_filter(&program) {
            Ok(()) => {}
            // The kernel was built without seccomp filters.
            Err(seccompiler::Error::Seccomp(e))
                if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
            {
                lacks.push("the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)".to_owned());
                return Ok(());
            }
            Err(e) => {
                return Err(Error::failed(format!("cannot install the system call filter: {e}"))
                    .hint("check whether a seccomp filter of the container or the service manager forbids seccomp(2)"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
