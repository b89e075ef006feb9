//! Privileges of a server: uid and gid of the store's owner, and no capabilities.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use stencilfs::error::{Error, Result};

/// Checks that the process has one thread: privileges are dropped for the calling thread only.
///
/// # Errors
/// Returns an error if there are more threads.
pub fn expect_one_thread() -> Result<()> {
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(n) => Err(Error::failed(format!("cannot enter the sandbox with {n} threads, expected 1"))
            .hint("report this bug of Stencil, with the version")),
        Err(e) => Err(Error::io("cannot count threads", "/proc/self/task", e).hint("mount /proc")),
    }
}

/// Drops all privileges permanently.
///
/// # Errors
/// Returns an error if a step fails that every kernel and container supports.
pub fn give_up(store: &Path, lacks: &mut Vec<String>) -> Result<()> {
    let fail = |what: &str| {
        let what = format!("cannot drop privileges: {what}");
        move |e: rustix::io::Errno| Error::failed(what).because(e.into())
    };
    rustix::thread::set_no_new_privs(true).map_err(fail("no_new_privs"))?;
    let owner =
        std::fs::metadata(store).map_err(|e| Error::io("cannot determine the store's owner", store, e))?;
    // The bounding set first: emptying it requires a capability.
    if let Err(e) = empty_bounding_set() {
        lacks.push(format!("the bounding set of capabilities is not empty: {}", std::io::Error::from(e)));
    }
    rustix::thread::clear_ambient_capability_set().map_err(fail("ambient capabilities"))?;
    if let Err(e) = become_owner(owner.uid(), owner.gid()) {
        lacks.push(format!(
            "the server runs as uid {} instead of the store's owner {}: {}",
            rustix::process::getuid().as_raw(),
            owner.uid(),
            std::io::Error::from(e)
        ));
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(fail("capabilities"))
}

/// Empties the bounding set, so that no later program gains a capability by running as root or by raising one.
fn empty_bounding_set() -> rustix::io::Result<()> {
    use CapabilitiesSecureBits as Bits;
    rustix::thread::set_capabilities_secure_bits(
        Bits::NO_ROOT
            | Bits::NO_ROOT_LOCKED
            | Bits::KEEP_CAPS_LOCKED
            | Bits::NO_CAP_AMBIENT_RAISE
            | Bits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    for bit in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Beyond the last capability of this kernel.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn become_owner(uid: u32, gid: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}
