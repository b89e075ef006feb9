//! Removal of a template that nobody uses, in two steps: first nobody can find it any more, then it is sought who has it.
//!
//! ```text
//!   mark ─▶ no lease? ─▶ every mount: nobody finds or opens it ─▶ no process maps it or has it open?
//!     ─▶ names locked: still so? ─▶ tags and folder go ─▶ mounts close what they have of it
//! ```
//! Whatever fails on the way, or kills this process, lets the mounts find it again.

use std::collections::BTreeMap;

use crate::clones::find;
use crate::control::{self, Condemnation, Mount, RemovalMark};
use crate::error::{Code, Error, Result};
use crate::store::{Digest, Removal, Removed, Serving, Store, TemplateRef, What, inode_number};
use crate::sys::users::{self, PATIENCE};

/// A template that nobody has, and nobody can get.
struct Cleared {
    store: Store,
    mark: RemovalMark,
    condemned: Condemnation,
}

/// Removes what `reference` names. A tag of a template that has others goes alone.
///
/// # Errors
/// [`Code::InUse`] that names processes and holders of leases, [`Code::TryAgain`] where it cannot be known; then nothing is
/// removed.
pub fn remove(store: &Store, reference: &TemplateRef) -> Result<Removed> {
    remove_what(store, What::Named(reference))
}

/// Removes a template that has no tag; one that has got a tag stays.
///
/// # Errors
/// As [`remove`].
pub fn remove_untagged(store: &Store, digest: &Digest) -> Result<Removed> {
    remove_what(store, What::Untagged(digest))
}

fn remove_what(store: &Store, what: What<'_>) -> Result<Removed> {
    let mut cleared: Option<Cleared> = None;
    loop {
        let digest = cleared.as_ref().map(|c| *c.condemned.digest());
        let last_look = || cleared.as_ref().map_or(Ok(false), Cleared::still_holds);
        let done = store.remove(what, digest.as_ref(), last_look);
        let removed = matches!(&done, Ok(Removal::Done(removed)) if removed.template.is_some());
        if let Some(Cleared { condemned, .. }) = cleared.take()
            && let Err(error) = condemned.release(removed)
        {
            // It lets go by itself when it finds that we are gone.
            log::warn!("{error}");
        }
        match done? {
            Removal::Done(removed) => return Ok(removed),
            Removal::Template(digest) => cleared = Some(Cleared::get(store, digest)?),
        }
    }
}

impl Cleared {
    fn get(store: &Store, digest: Digest) -> Result<Cleared> {
        let mark = RemovalMark::announce(store, &digest)?;
        mark.expect_no_lease()?;
        // What is in use is not hidden from anybody, not even for a moment.
        expect_unused(store, &digest, &control::every_mount_of(store)?)?;
        let mut condemned = Condemnation::new(digest);
        loop {
            let new: Vec<Mount> =
                control::every_mount_of(store)?.into_iter().filter(|m| !condemned.has(m)).collect();
            if new.is_empty() {
                return Ok(Cleared { store: store.clone(), mark, condemned });
            }
            condemned.extend(new)?;
            if let Err(error) = expect_unused(store, &digest, &condemned.mounts()) {
                // Who asks for it right after this finds it.
                condemned.release(false).unwrap_or_else(|e| log::warn!("{e}"));
                return Err(error);
            }
        }
    }

    /// Asked while no name can change: false where it is to be cleared anew.
    fn still_holds(&self) -> Result<bool> {
        self.mark.expect_no_lease()?;
        if control::every_mount_of(&self.store)?.iter().any(|mount| !self.condemned.has(mount)) {
            return Ok(false);
        }
        Ok(self.condemned.still_holds())
    }
}

/// Fails while a process maps a file of the template, or has one open, in one of these mounts.
fn expect_unused(store: &Store, digest: &Digest, mounts: &[Mount]) -> Result<()> {
    let template = match store.template(digest) {
        Ok(template) => template,
        Err(error) if error.code() == Code::NotFound => return Ok(()),
        Err(error) => {
            let why =
                format!("template {digest} is damaged, so its users cannot be found ({})", error.message());
            return Err(Error::in_use(why)
                .remedy("import the same memory again to repair it, or unmount the store first"));
        }
    };
    let secret = store.secret();
    let inodes: Vec<u64> = template
        .files()
        .iter()
        .flat_map(|file| Serving::ALL.map(|serving| inode_number(&secret, digest, &file.name, serving)))
        .collect();
    let mut using: BTreeMap<u32, &str> = BTreeMap::new();
    for mount in mounts {
        let users = users::users_of(mount.device, PATIENCE)?;
        if !users.unseen.is_empty() {
            return Err(Error::try_again(format!(
                "processes that may be clones could not be looked into within {} s: {}",
                PATIENCE.as_secs(),
                users::list_pids(&users.unseen)
            ))
            .remedy(
                "they wait for a file system that does not answer: `stencil doctor` names what is stuck",
            ));
        }
        for user in users.found {
            if inodes.iter().any(|ino| user.open.contains(ino)) {
                using.insert(user.pid, "open");
            }
        }
    }
    // This one also knows whether it may look into all of them.
    for clone in find::template_mappings(mounts)?.complete()? {
        if clone.maps.iter().any(|m| m.digest == *digest) {
            using.insert(clone.pid, "map");
        }
    }
    if using.is_empty() {
        return Ok(());
    }
    let maps = using.values().filter(|how| **how == "map").count();
    let what = match (maps, using.len() - maps) {
        (maps, 0) => format!("{maps} processes map it"),
        (0, open) => format!("{open} processes have it open"),
        (maps, open) => format!("{maps} processes map it, {open} more have it open"),
    };
    let pids: Vec<String> = using.keys().map(u32::to_string).collect();
    Err(Error::in_use(format!("template {digest} is in use: {what}: {}", pids.join(", ")))
        .remedy("stop them first: stencil stop ends the clones that Stencil launched"))
}
