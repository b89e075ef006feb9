//! Removal of unused templates. All mounts hide a template first; then the kernel is asked for users.
//!
//! ```text
//!   mark ─▶ no lease? no process maps it or has it open? ─▶ every mount: nobody finds or opens it ─▶ the kernel has no
//!     inode of it? ─▶ names locked: still so? ─▶ tags and folder go ─▶ the kernel has no inode of it?
//!     ─▶ mounts close what they have of it
//! ```
//! If a step fails, or this process is killed, the mounts find the template again. Every use of a file holds the file's
//! inode, with or without a process, so the kernel's answer decides. All processes are scanned before a template is hidden,
//! and again if the kernel knows an inode, to name the users. The last question to the kernel also finds users of a mount
//! that started during the removal; it depends on no time limit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::clones::find::{self, Inodes};
use crate::clones::unexplained::Explained;
use crate::control::{self, Condemnation, Mount, RemovalMark};
use crate::error::{Code, Error, Result};
use crate::store::{Digest, Refused, Removal, Removed, Serving, Store, Template, TemplateRef, inode_number};
use crate::sys::users;
use crate::sys::{loops, probe};

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
    mark: RemovalMark,
    condemned: Condemnation,
    files: BTreeMap<Digest, Files>,
}

/// What is known of the files of a template, and so of their inode numbers.
enum Files {
    /// The template is not in the store.
    None,
    Of(Box<Template>),
    /// The template does not open, for this reason.
    Unknown(String, Explained),
}

/// Removes what `reference` names. A tag of a template that has others goes alone.
///
/// # Errors
/// [`Code::InUse`] that names processes and holders of leases, [`Code::TryAgain`] where it cannot be known; then nothing is
/// removed.
pub fn remove(store: &Store, reference: &TemplateRef) -> Result<Removed> {
    let mut hidden: Option<(Digest, Hidden)> = None;
    let until = Instant::now() + LONGEST;
    loop {
        let unused = hidden.as_ref().map(|(digest, _)| *digest);
        let first = |refused: Refused| refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error));
        let is_hidden = || match &hidden {
            Some((digest, hidden)) => match hidden.leased(&[*digest])? {
                Some(leased) => first(leased).map(|()| true),
                None => Ok(false),
            },
            None => Ok(false),
        };
        let expect_unused = || match &hidden {
            Some((digest, hidden)) => first(hidden.used(&[*digest])?),
            None => Ok(()),
        };
        let done = store.remove(reference, unused.as_ref(), is_hidden, expect_unused);
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
                first(refused)?;
                hidden = Some((digest, ours));
            }
        }
    }
}

/// Removes those of at most [`BATCH`] templates that have no tag and that nobody uses. Gives for each whether it is gone;
/// it is not, without an error, if it has got a tag or was removed meanwhile.
///
/// # Errors
/// When the store cannot be read or written, or its mounts cannot be asked; for one template as [`remove`].
pub fn remove_untagged(store: &Store, digests: &[Digest]) -> Result<Vec<(Digest, Result<bool>)>> {
    let (mut hidden, refused) = Hidden::hide(store, digests)?;
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
        let mark = RemovalMark::announce(store, digests)?;
        let (mut files, mut refused) = (BTreeMap::new(), mark.leased(digests)?);
        let leased: BTreeSet<Digest> = refused.iter().map(|(digest, _)| *digest).collect();
        for digest in digests.iter().filter(|digest| !leased.contains(digest)) {
            match Files::of(store, digest) {
                Ok(of_it) => drop(files.insert(*digest, of_it)),
                Err(error) => refused.push((*digest, error)),
            }
        }
        let mounts = control::every_mount_of(store)?;
        expect_to_see_all(digests, &mounts)?;
        // What is in use is not hidden from anybody, not even for a moment.
        for (digest, error) in users_of(store, &files, &mounts)? {
            files.remove(&digest);
            refused.push((digest, error));
        }
        let condemned = Condemnation::new(files.keys().copied().collect());
        let mut ours = Hidden { store: store.clone(), mark, condemned, files };
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
        let refused = self.mark.leased(digests)?;
        let asked = |mount: &Mount| self.condemned.has(mount);
        let is_hidden =
            control::every_mount_of(&self.store)?.iter().all(asked) && self.condemned.still_holds();
        Ok(is_hidden.then_some(refused))
    }

    /// Those of the templates that are used in the mounts which hide them: the kernel has an inode of them.
    fn used(&self, digests: &[Digest]) -> Result<Refused> {
        let is_unknown = |digest: &&Digest| matches!(self.files.get(digest), Some(Files::Unknown(..)));
        let (unknown, known): (Vec<&Digest>, Vec<&Digest>) = digests.iter().partition(is_unknown);
        // Without inode numbers, a search of all processes decides.
        let mut refused = self.users_of(unknown.into_iter())?;
        let mut inodes = self.inodes_of(known.into_iter());
        let until = Instant::now() + RELEASE_TIMEOUT;
        loop {
            let numbers: Vec<u64> = inodes.keys().copied().collect();
            let in_kernel = self.condemned.known_inodes(&numbers)?;
            if in_kernel.is_empty() {
                return Ok(refused);
            }
            let (mut digests, is_late) = (BTreeSet::new(), Instant::now() > until);
            digests.extend(in_kernel.iter().map(|(_, inode)| inodes[inode].0));
            let mut found = self.users_of(digests.iter())?;
            digests.retain(|digest| found.iter().all(|(other, _)| other != digest));
            for (mount, inode) in in_kernel {
                let (digest, file) = &inodes[&inode];
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
    fn inodes_of<'a>(&self, digests: impl Iterator<Item = &'a Digest>) -> BTreeMap<u64, (Digest, String)> {
        let secret = self.store.secret();
        let mut inodes = BTreeMap::new();
        for digest in digests {
            let Some(Files::Of(template)) = self.files.get(digest) else { continue };
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
    fn users_of<'a>(&self, digests: impl Iterator<Item = &'a Digest>) -> Result<Refused> {
        let files = digests.filter_map(|digest| self.files.get_key_value(digest));
        users_of(&self.store, files, &self.condemned.mounts())
    }

    /// The mounts show the templates again, or, if the templates are removed, close what they have of them.
    fn release(&mut self, digests: &[Digest], is_removed: bool) {
        // A mount that does not answer lets go by itself when it finds that this process is gone.
        self.condemned.release(digests, is_removed).unwrap_or_else(|error| log::warn!("{error}"));
    }
}

impl Files {
    fn of(store: &Store, digest: &Digest) -> Result<Files> {
        match store.template(digest) {
            Ok(template) => Ok(Files::Of(Box::new(template))),
            Err(error) if error.code() == Code::TryAgain => Err(error),
            Err(error) => match store.find(digest)? {
                true => Ok(Files::Unknown(error.to_string(), Explained::by(store)?)),
                false => Ok(Files::None),
            },
        }
    }
}

/// The templates that processes or loop devices use in these mounts, with an error that names them. All processes are
/// searched once, and once more for each template that does not open.
fn users_of<'a>(
    store: &Store,
    templates: impl IntoIterator<Item = (&'a Digest, &'a Files)>,
    mounts: &[Mount],
) -> Result<Refused> {
    let (mut used, mut known, mut any) = (Refused::new(), BTreeMap::new(), false);
    for (digest, files) in templates {
        any = true;
        match files {
            Files::None => {}
            Files::Of(template) => drop(known.insert(*digest, &**template)),
            Files::Unknown(why, explained) => {
                let using = explained.users_of_others(store, mounts)?;
                if !using.is_empty() {
                    used.push((*digest, may_be_in_use(digest, why, &using)));
                }
            }
        }
    }
    let using = match known.is_empty() {
        true => BTreeMap::new(),
        false => find::users(&Inodes::of_templates(store, known.values().copied(), mounts))?,
    };
    used.extend(using.into_iter().map(|(digest, using)| (digest, in_use(&digest, &using))));
    if !any {
        return Ok(used);
    }
    for (device, path) in loops::files() {
        let holds = |digest: &Digest| {
            let name = digest.to_string();
            Path::new(&path).components().any(|part| part.as_os_str() == name.as_str())
        };
        if let Some(digest) = known.keys().find(|digest| holds(digest)) {
            let error =
                Error::in_use(format!("template {digest} is in use: loop device {device} has it open"))
                    .at(&path)
                    .remedy(format!("take the device away: losetup -d /dev/{device}"));
            used.push((*digest, error));
        }
    }
    Ok(used)
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
