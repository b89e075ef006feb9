//! Removal of unused templates. All mounts hide a template first; then the kernel is asked for users.
//!
//! ```text
//!   mark ─▶ no lease? no process maps it or has it open? ─▶ every mount: nobody finds or opens it ─▶ the kernel has no
//!     inode of it? ─▶ names locked: still so? ─▶ tags and folder are moved aside ─▶ the kernel has no inode of it? every
//!     mount still hides it? ─▶ tags and folder go ─▶ mounts close what they have of it
//! ```
//! If a step fails, or this process is killed, the template is restored and the mounts find it again. Every use of a file
//! holds the file's inode, with or without a process, so the kernel's answer decides. All processes are searched before a
//! template is hidden, and again if the kernel knows an inode, to name the users. A mount that starts during the removal is
//! found by the last look at all mounts. The files of a template that cannot be opened are not known, and so are not their
//! inodes: such a template is removed only while its store is not mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::clones::find::{self, Inodes};
use crate::control::{self, Condemnation, Mount, RemovalMark};
use crate::error::{Code, Error, Result};
use crate::store::{Digest, Refused, Removal, Removed, Serving, Store, Template, TemplateRef, inode_number};
use crate::sys::mount::FS_TYPE;
use crate::sys::{loops, probe, procfs};

/// Mounts that come and go for longer are not waited for.
const LONGEST: Duration = Duration::from_secs(60);

/// A file that was just closed is in use until the server has heard of it; so long.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the kernel is asked whether a file is still in use.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Most templates of one [`remove_untagged`]. The tags of the store are read, all processes searched, and each mount asked
/// once for so many. No name of the store can change while they are removed.
pub const BATCH: usize = 64;

/// Templates that nobody can find or open.
struct Hidden {
    store: Store,
    /// Nobody takes a lease while this lives.
    _mark: RemovalMark,
    condemned: Condemnation,
    templates: Templates,
}

/// The templates of a removal; why it cannot be opened, for one that cannot.
type Templates = BTreeMap<Digest, std::result::Result<Template, String>>;

/// Removes what `reference` names. A tag of a template that has others goes alone.
///
/// # Errors
/// [`Code::InUse`] that names processes and holders of leases, [`Code::TryAgain`] where it cannot be known; then nothing is
/// removed.
pub fn remove(store: &Store, reference: &TemplateRef) -> Result<Removed> {
    let mut hidden: Option<(Digest, Hidden)> = None;
    let until = Instant::now() + LONGEST;
    loop {
        // A template that was missing when `hide` ran is not hidden: another removal may have restored it since.
        let is_hidden = |(digest, hidden): &(Digest, Hidden)| hidden.condemned.digests().contains(digest);
        let unused = hidden.as_ref().filter(|of_it| is_hidden(of_it)).map(|(digest, _)| *digest);
        let done = store.remove(
            reference,
            unused.as_ref(),
            |digests| hidden.as_ref().map_or(Ok(None), |(_, hidden)| hidden.leased(digests)),
            |digests| hidden.as_ref().map_or(Ok(Refused::new()), |(_, hidden)| hidden.used(digests)),
        );
        if let Some((digest, mut hidden)) = hidden.take() {
            let is_removed = matches!(&done, Ok(Removal::Done(removed)) if removed.template.is_some());
            hidden.release(&[digest], is_removed);
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
            Removal::Template(digest) => {
                let (ours, refused) = Hidden::hide(store, &[digest])?;
                if let Some((_, error)) = refused.into_iter().next() {
                    return Err(error);
                }
                hidden = Some((digest, ours));
            }
        }
    }
}

/// Removes those of at most [`BATCH`] templates that have no tag and that nobody uses. Gives for each whether this has
/// removed it: false if it has a tag, or if another command has removed it.
///
/// # Errors
/// When the store cannot be read or written, or its mounts cannot be asked; for one template as [`remove`].
pub fn remove_untagged(store: &Store, digests: &[Digest]) -> Result<Vec<(Digest, Result<bool>)>> {
    // A template that got a tag after the caller listed it must not be hidden: clones may be starting from the tag.
    let (mut hidden, refused) = Hidden::hide(store, &store.untagged(digests)?)?;
    let unused = hidden.condemned.digests().to_vec();
    let mut done =
        store.remove_untagged(&unused, |digests| hidden.leased(digests), |digests| hidden.used(digests))?;
    for is_removed in [true, false] {
        let these = done.iter().filter(|(_, removed)| matches!(removed, Ok(true)) == is_removed);
        hidden.release(&these.map(|(digest, _)| *digest).collect::<Vec<_>>(), is_removed);
    }
    done.extend(refused.into_iter().map(|(digest, error)| (digest, Err(error))));
    Ok(done)
}

impl Hidden {
    /// Hides those of the templates that nobody uses.
    fn hide(store: &Store, digests: &[Digest]) -> Result<(Hidden, Refused)> {
        let mut mark = RemovalMark::announce(store, digests)?;
        // What is in use is not hidden from anybody, not even for a moment.
        let (templates, mut refused) = unused_of(store, digests)?;
        refused.iter().for_each(|(digest, _)| mark.end_for(digest));
        let condemned = Condemnation::new(templates.keys().copied().collect());
        let mut ours = Hidden { store: store.clone(), _mark: mark, condemned, templates };
        loop {
            let mut new = control::every_mount_of(store)?;
            new.retain(|m| !ours.condemned.has(m));
            if new.is_empty() || ours.condemned.digests().is_empty() {
                return Ok((ours, refused));
            }
            ours.condemned.extend(new)?;
            let used = ours.used(ours.condemned.digests())?;
            // The next lookup finds them.
            ours.release(&used.iter().map(|(digest, _)| *digest).collect::<Vec<_>>(), false);
            refused.extend(used);
        }
    }

    /// Those of the templates that somebody has a lease of; `None` if a mount may show one of them. Asked while no name of
    /// the store can change.
    fn leased(&self, digests: &[Digest]) -> Result<Option<Refused>> {
        let refused = control::leased(&self.store, digests)?;
        let asked = |mount: &Mount| self.condemned.has(mount);
        let is_hidden =
            control::every_mount_of(&self.store)?.iter().all(asked) && self.condemned.still_holds();
        Ok(is_hidden.then_some(refused))
    }

    /// Those of the templates that are used in the mounts which hide them: the kernel has an inode of them.
    fn used(&self, digests: &[Digest]) -> Result<Refused> {
        let mut refused = unreadable(&self.templates, &self.condemned.mounts());
        refused.retain(|(digest, _)| digests.contains(digest));
        let mut inodes = self.inodes_of(digests);
        let until = Instant::now() + RELEASE_TIMEOUT;
        loop {
            let numbers: Vec<u64> = inodes.keys().copied().collect();
            let in_kernel = self.condemned.known_inodes(&numbers)?;
            if in_kernel.is_empty() {
                return Ok(refused);
            }
            let is_late = Instant::now() > until;
            let of = |inode: &u64| inodes.get(inode).ok_or_else(|| not_asked_for(*inode));
            let of_these = in_kernel.iter().map(|(_, inode)| Ok(of(inode)?.0));
            let mut digests = of_these.collect::<Result<BTreeSet<Digest>>>()?;
            let mut found = self.users_of(&digests)?;
            digests.retain(|digest| found.iter().all(|(other, _)| other != digest));
            for (mount, inode) in &in_kernel {
                let (digest, file) = of(inode)?;
                if is_late && digests.remove(digest) {
                    found.push((*digest, used_by_nobody_seen(digest, mount, file)));
                }
            }
            inodes.retain(|_, (digest, _)| found.iter().all(|(other, _)| other != digest));
            refused.extend(found);
            if !digests.is_empty() {
                thread::sleep(RETRY_INTERVAL);
                self.condemned.repeat(&digests.into_iter().collect::<Vec<_>>())?;
            }
        }
    }

    /// The inode numbers that the files of these templates have in every mount, with template and file name.
    fn inodes_of(&self, digests: &[Digest]) -> BTreeMap<u64, (Digest, String)> {
        let secret = self.store.secret();
        let mut inodes = BTreeMap::new();
        for digest in digests {
            let Some(Ok(template)) = self.templates.get(digest) else { continue };
            for (file, serving) in
                template.files().iter().flat_map(|f| Serving::ALL.map(|serving| (f, serving)))
            {
                let number = inode_number(&secret, digest, &file.name, serving);
                inodes.insert(number, (*digest, file.name.clone()));
            }
        }
        inodes
    }

    /// Those of the templates that processes use in the mounts which hide them.
    fn users_of(&self, digests: &BTreeSet<Digest>) -> Result<Refused> {
        let of_these = self.templates.iter().filter(|(digest, _)| digests.contains(digest));
        users_of(
            &self.store,
            of_these.filter_map(|(_, template)| template.as_ref().ok()),
            &self.condemned.mounts(),
        )
    }

    /// The mounts show the templates again, or, if the templates are removed, close what they have of them.
    fn release(&mut self, digests: &[Digest], is_removed: bool) {
        // A mount that does not answer lets go by itself when it finds that this process is gone.
        self.condemned.release(digests, is_removed).unwrap_or_else(|error| log::warn!("{error}"));
    }
}

/// Those of the templates that a process uses or has leased, with an error that names it, and those of which that cannot be
/// known. Users that no process shows are found by a removal alone.
///
/// # Errors
/// As [`remove`].
pub fn used(store: &Store, digests: &[Digest]) -> Result<Refused> {
    unused_of(store, digests).map(|(_, refused)| refused)
}

/// The templates that no process uses or has leased, and the templates that a process does. A template that the store does
/// not have is in neither list.
fn unused_of(store: &Store, digests: &[Digest]) -> Result<(Templates, Refused)> {
    let mut refused = control::leased(store, digests)?;
    let mut templates = Templates::new();
    let leased: BTreeSet<Digest> = refused.iter().map(|(digest, _)| *digest).collect();
    for digest in digests.iter().filter(|digest| !leased.contains(digest)) {
        match store.template(digest) {
            Ok(template) => drop(templates.insert(*digest, Ok(template))),
            Err(error) if error.code() == Code::TryAgain => refused.push((*digest, error)),
            Err(error) if store.find(digest)? => drop(templates.insert(*digest, Err(error.to_string()))),
            // It is not in the store.
            Err(_) => {}
        }
    }
    let mounts = control::every_mount_of(store)?;
    expect_to_see_all(digests, &mounts)?;
    let mut used = unreadable(&templates, &mounts);
    used.extend(users_of(store, templates.values().filter_map(|template| template.as_ref().ok()), &mounts)?);
    used.iter().for_each(|(digest, _)| drop(templates.remove(digest)));
    refused.extend(used);
    Ok((templates, refused))
}

/// The templates that cannot be opened, if the store has a mount that may serve them.
fn unreadable(templates: &Templates, mounts: &[Mount]) -> Refused {
    let Some(mount) = mounts.first() else { return Refused::new() };
    let error = |(digest, template): (&Digest, &std::result::Result<Template, String>)| {
        let why = template.as_ref().err()?;
        Some((*digest, may_be_in_use(digest, why, mount)))
    };
    templates.iter().filter_map(error).collect()
}

/// The templates that processes or loop devices use in these mounts, each with an error that names them. All processes are
/// searched once.
fn users_of<'a>(
    store: &Store,
    templates: impl Iterator<Item = &'a Template>,
    mounts: &[Mount],
) -> Result<Refused> {
    let templates: Vec<&Template> = templates.collect();
    if templates.is_empty() {
        return Ok(Refused::new());
    }
    let using = find::users(&Inodes::of_templates(store, templates.iter().copied(), mounts))?;
    let mut used: BTreeMap<Digest, Error> =
        using.into_iter().map(|(digest, using)| (digest, in_use(&digest, &using))).collect();
    let table = procfs::mounts()?;
    // Two stores with the same content serve different files under the same digest. A mount of this store that another
    // runtime directory records is not in `mounts`, so a file is ignored only if its mount serves a store with another id.
    let is_of_another_store = |path: &Path| {
        let mount = table.iter().rfind(|mount| path.starts_with(&mount.mountpoint));
        mount.is_some_and(|mount| {
            mount.fs_type == FS_TYPE
                && mounts.iter().all(|ours| ours.device != mount.dev)
                && Store::open(Path::new(&mount.source)).is_ok_and(|other| other.id() != store.id())
        })
    };
    let files = loops::files().into_iter().filter(|(_, path)| !is_of_another_store(Path::new(path)));
    for (device, path) in files {
        let holds = |digest: &Digest| {
            let name = digest.to_string();
            Path::new(&path).components().any(|part| part.as_os_str() == name.as_str())
        };
        if let Some(digest) = templates.iter().map(|template| template.digest()).find(|digest| holds(digest))
        {
            used.entry(*digest).or_insert_with(|| {
                Error::in_use(format!("template {digest} is in use: loop device {device} has it open"))
                    .at(&path)
                    .remedy(format!("take the device away: losetup -d /dev/{device}"))
            });
        }
    }
    Ok(used.into_iter().collect())
}

/// Fails where a mount has served the store and processes of the host may be out of sight.
fn expect_to_see_all(digests: &[Digest], mounts: &[Mount]) -> Result<()> {
    let Some(mount) = mounts.first() else { return Ok(()) };
    let namespace = match (probe::in_initial_pid_namespace(), probe::in_initial_user_namespace()) {
        (true, true) => return Ok(()),
        (false, _) => "PID",
        (true, false) => "user",
    };
    Err(Error::try_again(format!(
        "this command runs in another {namespace} namespace than the host's, so clones of {} may be out of sight",
        Digest::describe_all(digests)
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

fn may_be_in_use(digest: &Digest, why: &str, mount: &Mount) -> Error {
    Error::try_again(format!(
        "template {digest} may be in use: it cannot be opened ({why}), so the inodes of its files are not known"
    ))
    .at(&mount.mountpoint)
    .remedy(
        "import the same memory again, which repairs the template; or remove it when the store is not mounted: \
         stencil umount",
    )
}

fn not_asked_for(inode: u64) -> Error {
    Error::failed(format!("a mount of the store names inode {inode}, which it was not asked for"))
        .remedy("replace its supervisor: stencil restart")
}

fn in_use(digest: &Digest, using: &BTreeMap<u32, &str>) -> Error {
    let maps = using.values().filter(|how| **how == "map").count();
    let what = match (maps, using.len() - maps) {
        (maps, 0) => format!("{maps} processes map it"),
        (0, open) => format!("{open} processes have it open"),
        (maps, open) => format!("{maps} processes map it, {open} more have it open"),
    };
    let pids: Vec<String> = using.keys().map(u32::to_string).collect();
    Error::in_use(format!("template {digest} is in use: {what}: {}", pids.join(", ")))
        .remedy("stop them first: stencil stop ends the clones that Stencil launched")
}
