//! What a server can reach through the file system: the store, for reading.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use stencilfs::error::{Error, Result};
use stencilfs::sys::folder::Folder;

/// The newest interface whose rights are taken away; an older kernel takes away what it knows.
const KNOWN: ABI = ABI::V7;

fn fail(what: &dyn std::fmt::Display) -> Error {
    Error::failed(format!("Landlock cannot be set up: {what}"))
        .remedy("see whether the container's filter forbids the landlock system calls")
}

/// Rules that allow to read what lies below `store`; everything else is forbidden: other files, writing, TCP, abstract
/// sockets and signals to others.
///
/// # Errors
/// When the folder cannot be found.
pub fn rules(store: &Path) -> Result<RulesetCreated> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|r| r.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|r| r.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(|e| fail(&e))?;
    let fd = PathFd::new(store).map_err(|e| {
        let landlock::PathFdError::OpenCall { source, .. } = e else { return fail(&e) };
        Error::io("the server cannot be confined to the store", store, source)
    })?;
    rules.add_rule(PathBeneath::new(fd, AccessFs::ReadFile | AccessFs::ReadDir)).map_err(|e| fail(&e))
}

/// From here on the rules hold.
///
/// # Errors
/// When a kernel that has Landlock refuses.
pub fn restrict(rules: RulesetCreated, lacks: &mut Vec<String>) -> Result<()> {
    let RestrictionStatus { ruleset, landlock, .. } = rules.restrict_self().map_err(|e| fail(&e))?;
    if ruleset != RulesetStatus::FullyEnforced {
        lacks.push(match landlock {
            LandlockStatus::NotImplemented => {
                "the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK)".to_owned()
            }
            LandlockStatus::NotEnabled => {
                "Landlock is not switched on (boot with landlock in lsm=)".to_owned()
            }
            LandlockStatus::Available { effective_abi, .. } => format!(
                "the kernel's Landlock has version {}, and knows not all that version {} forbids",
                effective_abi as i32, KNOWN as i32
            ),
        });
    }
    Ok(())
}

/// The store's owner must be able to come to the store: every folder above it must let them pass.
///
/// # Errors
/// When not.
pub fn expect_readable(store: &Path) -> Result<()> {
    let header = store.join("format");
    match Folder::open(store).and_then(|folder| folder.file("format")) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            let uid = rustix::process::getuid().as_raw();
            Err(Error::io(format!("the store's owner (uid {uid}) cannot read the store"), &header, e).remedy(
                "servers have the rights of the store's owner: let it pass through every folder above the store \
                 (chmod o+x), and own every file in it (chown -R)",
            ))
        }
        // Whatever else is wrong with the store is said by whoever opens it.
        _ => Ok(()),
    }
}
