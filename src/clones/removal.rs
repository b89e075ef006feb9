//! Removal of a template that nobody uses, in two steps: first nobody can find it any more, then it is sought who has it.
//!
//! ```text
//!   mark ─▶ no lease? nobody uses it? ─▶ every mount: nobody finds or opens it ─▶ no process maps it or has it open?
//!     ─▶ the kernel has no inode of it? ─▶ names locked: still so? ─▶ tags and folder go ─▶ the same questions
//!     ─▶ mounts close what they have of it
//! ```
//! Whatever fails on the way, or kills this process, lets the mounts find it again. The last questions see also who came
//! by a mount that began in between, and do not rely on a time.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::clones::find::{self, Inodes, Search};
use crate::clones::unexplained::Explained;
use crate::control::{self, Condemnation, Mount, RemovalMark};
use crate::error::{Code, Error, Result};
use crate::store::{
    Digest, Removal, Removed, Serving, Store, Template, TemplateFile, TemplateRef, What, inode_number,
};
use crate::sys::users::{self, PATIENCE};
use crate::sys::{loops, probe};

/// Mounts that come and go for longer are not waited for.
const LONGEST: Duration = Duration::from_secs(60);

/// A file that was just closed is in use until the server has heard of it; so long.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the kernel is asked whether a file is still in use.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A template that nobody can get.
struct Cleared {
    store: Store,
    mark: RemovalMark,
    condemned: Condemnation,
    files: Files,
}

/// What is known of the files of a template, and so of their inode numbers.
enum Files {
    /// It is not there.
    None,
    Of(Box<Template>),
    /// It does not open, for this reason.
    Unknown(String, Explained),
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
    let until = Instant::now() + LONGEST;
    loop {
        let digest = cleared.as_ref().map(|c| *c.condemned.digest());
        let is_hidden = || cleared.as_ref().map_or(Ok(false), Cleared::is_hidden);
        let done = store.remove(what, digest.as_ref(), is_hidden, || {
            cleared.as_ref().map_or(Ok(()), Cleared::expect_released)
        });
        let removed = matches!(&done, Ok(Removal::Done(removed)) if removed.template.is_some());
        if let Some(Cleared { condemned, .. }) = cleared.take()
            && let Err(error) = condemned.release(removed)
        {
            // It lets go by itself when it finds that we are gone.
            log::warn!("{error}");
        }
        match done? {
            Removal::Done(removed) => return Ok(removed),
            Removal::Template(digest) if Instant::now() > until => {
                return Err(Error::try_again(format!(
                    "mounts of the store have come and gone for {} s while template {digest} was to be removed",
                    LONGEST.as_secs()
                ))
                .remedy("see `stencil status`, and run it again when they stay"));
            }
            Removal::Template(digest) => cleared = Some(Cleared::get(store, digest)?),
        }
    }
}

impl Cleared {
    fn get(store: &Store, digest: Digest) -> Result<Cleared> {
        let mark = RemovalMark::announce(store, &digest)?;
        mark.expect_no_lease()?;
        let files = match store.template(&digest) {
            Ok(template) => Files::Of(Box::new(template)),
            Err(error) if error.code() == Code::TryAgain => return Err(error),
            Err(error) => match store.find(&digest)? {
                true => Files::Unknown(error.to_string(), Explained::by(store)?),
                false => Files::None,
            },
        };
        let condemned = Condemnation::new(digest);
        let mut ours = Cleared { store: store.clone(), mark, condemned, files };
        let mounts = control::every_mount_of(store)?;
        expect_to_see_all(&digest, &mounts)?;
        // What is in use is not hidden from anybody, not even for a moment.
        ours.expect_unused(&mounts)?;
        loop {
            let mut new = control::every_mount_of(store)?;
            new.retain(|m| !ours.condemned.has(m));
            if new.is_empty() {
                return Ok(ours);
            }
            ours.condemned.extend(new)?;
            if let Err(error) = ours.expect_released() {
                // Who asks for it right after this finds it.
                ours.condemned.release(false).unwrap_or_else(|e| log::warn!("{e}"));
                return Err(error);
            }
        }
    }

    /// Asked while no name can change: false where it is to be cleared anew.
    fn is_hidden(&self) -> Result<bool> {
        self.mark.expect_no_lease()?;
        if control::every_mount_of(&self.store)?.iter().any(|mount| !self.condemned.has(mount)) {
            return Ok(false);
        }
        Ok(self.condemned.still_holds())
    }

    /// Fails while anybody uses the template in the mounts that have condemned it. Processes are searched to name them;
    /// that there is nobody else, the kernel says: it has no inode of the template any more.
    fn expect_released(&self) -> Result<()> {
        self.expect_unused(&self.condemned.mounts())?;
        let (digest, Files::Of(template)) = (self.condemned.digest(), &self.files) else { return Ok(()) };
        let secret = self.store.secret();
        let numbers = |file: &TemplateFile| {
            Serving::ALL.map(|serving| inode_number(&secret, digest, &file.name, serving))
        };
        let inodes: Vec<u64> = template.files().iter().flat_map(numbers).collect();
        let until = Instant::now() + RELEASE_TIMEOUT;
        loop {
            let Some((mount, inode)) = self.condemned.used(&inodes)? else { return Ok(()) };
            if Instant::now() > until {
                let file = template.files().iter().find(|file| numbers(file).contains(&inode));
                let name = file.map_or("", |file| file.name.as_str());
                return Err(used_by_nobody_seen(digest, mount, name));
            }
            thread::sleep(RETRY_INTERVAL);
            self.condemned.repeat()?;
        }
    }

    /// Fails while a process maps a file of the template, or has one open, in one of these mounts.
    fn expect_unused(&self, mounts: &[Mount]) -> Result<()> {
        let digest = self.condemned.digest();
        let using = match &self.files {
            Files::None => return Ok(()),
            Files::Of(template) => users_of(&self.store, template, mounts)?,
            Files::Unknown(_, explained) => explained.users_of_others(&self.store, mounts)?,
        };
        let name = digest.to_string();
        let holds = |path: &str| Path::new(path).components().any(|c| c.as_os_str() == name.as_str());
        if let Some((device, path)) = loops::files().into_iter().find(|(_, path)| holds(path)) {
            return Err(Error::in_use(format!(
                "template {digest} is in use: loop device {device} has it open"
            ))
            .at(path)
            .remedy(format!("take the device away: losetup -d /dev/{device}")));
        }
        match &self.files {
            Files::Unknown(why, _) if !using.is_empty() => Err(may_be_in_use(digest, why, &using)),
            _ => in_use(digest, &using),
        }
    }
}

/// Fails where a mount has served the store and processes of the host may be out of sight.
fn expect_to_see_all(digest: &Digest, mounts: &[Mount]) -> Result<()> {
    let Some(mount) = mounts.first() else { return Ok(()) };
    let namespace = match (probe::in_initial_pid_namespace(), probe::in_initial_user_namespace()) {
        (true, true) => return Ok(()),
        (false, _) => "PID",
        (true, false) => "user",
    };
    Err(Error::try_again(format!(
        "this command runs in another {namespace} namespace than the host's, so clones of template {digest} may be \
         out of sight"
    ))
    .at(&mount.mountpoint)
    .remedy("run it as root of the host, outside of containers; or unmount the store first"))
}

fn used_by_nobody_seen(digest: &Digest, mount: &Mount, file: &str) -> Error {
    Error::in_use(format!(
        "template {digest} is in use: the kernel holds its file '{file}' for a user that no process shows"
    ))
    .at(&mount.mountpoint)
    .remedy(
        "look for an overlay mount of it, a bind mount of the file, a loop device, or a descriptor that is in a \
         socket or an io_uring; docs/operating.md lists all ways",
    )
}

/// Processes that have a file of the template open or map it, in one of these mounts.
fn users_of(store: &Store, template: &Template, mounts: &[Mount]) -> Result<BTreeMap<u32, &'static str>> {
    let inodes = Inodes::of_template(store, template, mounts);
    let mut using = BTreeMap::new();
    for mount in mounts {
        let users = users::users_of(mount.device, PATIENCE)?;
        Search { clones: Vec::new(), unseen: users.unseen }.complete()?;
        for user in users.found {
            if user.open.iter().any(|ino| inodes.lookup(mount.device, *ino).is_some()) {
                using.insert(user.pid, "open");
            }
        }
    }
    // This one also knows whether it may look into all of them.
    for clone in find::search(&inodes)?.complete()? {
        using.extend(clone.processes().map(|process| (process.pid, "map")));
    }
    Ok(using)
}

/// The template does not open, and somebody uses files of its mounts that are of no other template.
fn may_be_in_use(digest: &Digest, why: &str, using: &BTreeMap<u32, &str>) -> Error {
    let pids: Vec<u32> = using.keys().copied().collect();
    Error::in_use(format!(
        "template {digest} may be in use: it cannot be opened ({why}), and these processes use files that belong to no \
         other template: {}",
        users::list_pids(&pids)
    ))
    .remedy("stop them first; or import the same memory again, which repairs the template")
}

fn in_use(digest: &Digest, using: &BTreeMap<u32, &str>) -> Result<()> {
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
