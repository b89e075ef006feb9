//! What a server gives up before it reads a byte that it did not write itself: docs/explanation/security.md says what for.
//!
//! ```text
//!   inherited descriptors, memory, sockets ── made before ──┐
//!                                                           ▼  one thread, no byte of the store read yet
//!   no new privileges → no capabilities, uid of the store's owner → Landlock: the store, for reading → seccomp: a list
//! ```
//! Nothing of it can be taken back, by the server or by what took the server over. A kernel that lacks a part is
//! named and served on: a host that shares without Landlock is better off than one that does not share.

pub mod attempt;
mod calls;
mod files;
mod privileges;

use std::path::Path;

use stencilfs::error::{Error, Result};
use stencilfs::sys::clock;

pub use calls::{CALLS, Refused};

/// What becomes of a forbidden system call: `kill` ends the server, everything else that is set is refused.
pub const VARIABLE: &str = "STENCIL_SECCOMP";

/// Enters the sandbox: from here on this process can read the store and use what it has open, and nothing else. Gives
/// the parts that this kernel could not do, each in words; they are in the log already.
///
/// # Errors
/// When there are other threads already (they would stay outside), when the store's owner cannot reach the store, or
/// when a part fails that this kernel should have.
pub fn enter(store: &Path) -> Result<Vec<String>> {
    privileges::expect_one_thread()?;
    let refused = refused(std::env::var_os(VARIABLE).as_deref())?;
    // Both make calls that are not on the list, once, and remember: the kernel's fast paths, and the time namespace.
    let _ = (rustix::param::page_size(), clock::monotonic());
    // Found before the uid changes: the way to the store may be closed to its owner.
    let rules = files::rules(store)?;
    let mut lacks = Vec::new();
    privileges::give_up(store, &mut lacks)?;
    files::restrict(rules, &mut lacks)?;
    files::expect_readable(store)?;
    filter(refused, &mut lacks)?;
    for lack in &lacks {
        log::warn!("the server is less isolated than it could be: {lack}");
    }
    Ok(lacks)
}

fn refused(word: Option<&std::ffi::OsStr>) -> Result<Refused> {
    match word.map(|w| w.to_str().unwrap_or("?")) {
        None | Some("" | "eperm") => Ok(Refused::Eperm),
        Some("kill") => Ok(Refused::Kill),
        Some(other) => Err(Error::usage(format!("{VARIABLE} is '{other}', expected kill, eperm or nothing"))
            .remedy(format!("unset {VARIABLE}"))),
    }
}

/// The last step: what it needs itself is not on the list.
fn filter(refused: Refused, lacks: &mut Vec<String>) -> Result<()> {
    let Some(programs) = calls::programs(refused)? else {
        lacks.push(format!("no filter of system calls is known for {} processors", std::env::consts::ARCH));
        return Ok(());
    };
    for program in programs {
        match seccompiler::apply_filter(&program) {
            Ok(()) => {}
            // Not built into this kernel.
            Err(seccompiler::Error::Seccomp(e))
                if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
            {
                lacks.push("the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)".to_owned());
                return Ok(());
            }
            Err(e) => {
                return Err(Error::failed(format!("the filter of system calls cannot be installed: {e}"))
                    .remedy("see whether the container's own filter forbids seccomp(2)"));
            }
        }
    }
    Ok(())
}
