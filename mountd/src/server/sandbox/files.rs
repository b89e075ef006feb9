//! Landlock rules: a server can reach the store, for reading, and nothing else in the file system.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::directory::Directory;

/// The latest Landlock ABI that is requested; an older kernel enforces the part that it supports.
const KNOWN: ABI = ABI::V6;

fn fail(what: &dyn std::fmt::Display) -> Error {
    Error::failed(format!("cannot set up Landlock: {what}"))
        .hint("check whether the container's seccomp filter forbids the landlock system calls")
}

/// Creates rules that allow reading below `store` and forbid everything else: other files, writing, TCP, abstract
/// sockets, and signals to processes outside.
///
/// # Errors
/// Returns an error if the directory cannot be opened.
pub fn rules(store: &Path) -> Result<RulesetCreated> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|r| r.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|r| r.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(|e| fail(&e))?;
    let fd = PathFd::new(store).map_err(|e| {
        let landlock::PathFdError::OpenCall { source, .. } = e else { return fail(&e) };
        Error::io("cannot confine the server to the store", store, source)
    })?;
    rules.add_rule(PathBeneath::new(fd, AccessFs::ReadFile | AccessFs::ReadDir)).map_err(|e| fail(&e))
}

/// Applies the rules to this thread.
///
/// # Errors
/// Returns an error if a kernel with Landlock refuses.
pub fn restrict(rules: RulesetCreated, lacks: &mut Vec<String>) -> Result<()> {
    let RestrictionStatus { ruleset, landlock, .. } = rules.restrict_self().map_err(|e| fail(&e))?;
    if ruleset != RulesetStatus::FullyEnforced {
        lacks.push(match landlock {
            LandlockStatus::NotImplemented => {
                "the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK)".to_owned()
            }
            LandlockStatus::NotEnabled => {
                "Landlock is disabled (add landlock to lsm= on the kernel command line)".to_owned()
            }
            LandlockStatus::Available { effective_abi, .. } => format!(
                "the kernel has Landlock ABI {}, which enforces less than ABI {}",
                effective_abi as i32, KNOWN as i32
            ),
        });
    }
    Ok(())
}

/// Checks that this process, which already has the uid of the store's owner, can read the store: the owner needs search
/// permission for every directory above the store.
///
/// # Errors
/// Returns an error if the owner has no access.
pub fn expect_readable(store: &Path) -> Result<()> {
    let header = store.join("format");
    match Directory::open(store).and_then(|folder| folder.file("format")) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            let uid = rustix::process::getuid().as_raw();
            Err(Error::io(format!("the store's owner (uid {uid}) cannot read the store"), &header, e).hint(
                "servers run as the store's owner: allow the owner to search every directory above the store (chmod \
                 o+x), and make the owner own all its files (chown -R)",
            ))
        }
        // Other errors are reported when the store is opened.
        _ => Ok(()),
    }
}
