//! Removal of unused templates. All mounts hide the template first; then the kernel is asked for users.
//!
//! ```text
//!   mark ─▶ no lease? no process maps or has open? ─▶ condemn: every mount hides the template ─▶ the kernel has no
//!     inode of it? ─▶ lock names: still no lease? ─▶ move tags and directory aside ─▶ confirm: the kernel has no
//!     inode of it? every mount still hides it? ─▶ remove tags and directory ─▶ release: mounts close their files
//! ```
//!
//! If a step fails, or this process is killed, the template is restored and the mounts show it again. Every use of a
//! file holds the file's inode, with or without a process, so the kernel's inodes decide. All processes are scanned
//! before a template is hidden, and again if the kernel has an inode, to name the users. The last check of all mounts
//! finds a mount that starts during the removal. The files and inodes of a template that cannot be opened are unknown,
//! so such a template is removed only while its store is not mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::clones::counted;
use crate::clones::find::{self, Inodes, handlers};
use crate::control::{self, Condemnation, Mount, RemovalMark};
use crate::error::{Code, Error, Result};
use crate::store::{Digest, Refused, Removal, Removed, Serving, Store, Template, TemplateRef, inode_number};
use crate::sys::files::loop_devices;
use crate::sys::files::mount::FS_TYPE;
use crate::sys::probe;
use crate::sys::process::procfs;

/// Time limit for mounts of the store to stop appearing and disappearing.
const MOUNTS_TIMEOUT: Duration = Duration::from_secs(60);

/// Time after which a closed file is no longer in use: the kernel sends the release to the server asynchronously.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// Time between two requests for the kernel's inodes.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Maximum number of templates for one [`remove_untagged`]. For each batch, the tags are read, all processes scanned,
/// and each mount asked once. No name of the store can change during the removal of a batch.
pub const BATCH: usize = 64;

/// Templates that all mounts hide, so that no process can find or open them.
struct Hidden {
    store: Store,
    /// While the mark exists, no lease can be taken.
    _mark: RemovalMark,
    condemned: Condemnation,
    templates: Templates,
}

/// The templates of a removal; an error for each template that cannot be opened.
type Templates = BTreeMap<Digest, std::result::Result<Template, String>>;

/// Removes the template that `reference` names. If the reference is a tag and the template has other tags, only the tag
/// is removed.
///
/// # Errors
/// Returns [`Code::InUse`], with the processes or lease holders, if the template is in use, and [`Code::TryAgain`] if
/// its use cannot be determined. In both cases nothing is removed.
pub fn remove(store: &Store, reference: &TemplateRef) -> Result<Removed> {
    let mut hidden: Option<(Digest, Hidden)> = None;
    let until = Instant::now() + MOUNTS_TIMEOUT;
    loop {
        // A template that was missing when `hide` ran is not hidden: another removal may have restored the template
        // since.
        let is_hidden = |(digest, hidden): &(Digest, Hidden)| hidden.condemned.digests().contains(digest);
        let unused = hidden.as_ref().filter(|hidden| is_hidden(hidden)).map(|(digest, _)| *digest);
        let done = store.remove(
            reference,
            unused.as_ref(),
            |digests| hidden.as_ref().map_or(Ok(None), |(_, hidden)| hidden.leased(digests)),
            |digests| hidden.as_ref().map_or(Ok(Refused::new()), |(_, hidden)| hidden.used(digests)),
        );
        if let Some((digest, mut hidden)) = hidden.take() {
            let is_removed = matches!(&done, Ok(Removal::Done(removed)) if removed.digest.is_some());
            hidden.release(&[digest], is_removed);
        }
        match done? {
            Removal::Done(removed) => return Ok(removed),
            Removal::Template(digest) if Instant::now() > until => {
                return Err(Error::try_again(format!(
                    "cannot remove template {digest}: for {} s the mounts of the store changed, or this command was stopped",
                    MOUNTS_TIMEOUT.as_secs()
                ))
                .hint("run 'stencil status', and run this command again when the mounts do not change"));
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

/// Removes the templates that have no tag and are not in use, at most [`BATCH`]. Returns for each template whether this
/// call removed the template: false if the template has a tag or another command removed the template.
///
/// # Errors
/// Returns an error if the store cannot be read or written, or a mount does not respond; for one template the same
/// errors as [`remove`].
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
    /// Hides the templates that are not in use.
    fn hide(store: &Store, digests: &[Digest]) -> Result<(Hidden, Refused)> {
        let mut mark = RemovalMark::announce(store, digests)?;
        // Templates that are leased or used by a process now are not hidden. A template whose use only the kernel
        // knows, or that is used from now on, is hidden until it is released below.
        let (templates, mut refused) = unused_of(store, digests)?;
        refused.iter().for_each(|(digest, _)| mark.end_for(digest));
        let condemned = Condemnation::new(templates.keys().copied().collect());
        let mut ours = Hidden { store: store.clone(), _mark: mark, condemned, templates };
        loop {
            let mut new = control::every_mount_of(store)?;
            new.retain(|m| !ours.condemned.contains(m));
            if new.is_empty() || ours.condemned.digests().is_empty() {
                return Ok((ours, refused));
            }
            ours.condemned.extend(new)?;
            let used = ours.used(ours.condemned.digests())?;
            // Lookups in the mounts find these templates again.
            ours.release(&used.iter().map(|(digest, _)| *digest).collect::<Vec<_>>(), false);
            refused.extend(used);
        }
    }

    /// Returns the leased templates; `None` if a mount may show one of the templates. Called while no name of the store
    /// can change.
    fn leased(&self, digests: &[Digest]) -> Result<Option<Refused>> {
        let refused = control::leased(&self.store, digests)?;
        let is_condemned = |mount: &Mount| self.condemned.contains(mount);
        let is_hidden =
            control::every_mount_of(&self.store)?.iter().all(is_condemned) && self.condemned.still_holds();
        Ok(is_hidden.then_some(refused))
    }

    /// Returns the templates that are used in the mounts that hide them: the kernel has an inode of the template.
    fn used(&self, digests: &[Digest]) -> Result<Refused> {
        let mut refused = unreadable(&self.templates, &self.condemned.mounts());
        refused.retain(|(digest, _)| digests.contains(digest));
        let mut inodes = self.inodes_of(digests);
        let until = Instant::now() + RELEASE_TIMEOUT;
        loop {
            let numbers: Vec<u64> = inodes.keys().copied().collect();
            let in_kernel = self.condemned.cached_inodes(&numbers)?;
            if in_kernel.is_empty() {
                return Ok(refused);
            }
            let is_late = Instant::now() > until;
            let of = |inode: &u64| inodes.get(inode).ok_or_else(|| unexpected_inode(*inode));
            let of_these = in_kernel.iter().map(|(_, inode)| Ok(of(inode)?.0));
            let mut digests = of_these.collect::<Result<BTreeSet<Digest>>>()?;
            let mut found = self.users_of(&digests)?;
            digests.retain(|digest| found.iter().all(|(other, _)| other != digest));
            for (mount, inode) in &in_kernel {
                let (digest, file) = of(inode)?;
                if is_late && digests.remove(digest) {
                    found.push((*digest, used_without_process(digest, mount, file)));
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

    /// Returns the inode numbers of the templates' files, which are the same in every mount, with digest and file name.
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

    /// Returns the templates that processes use in the mounts that hide them.
    fn users_of(&self, digests: &BTreeSet<Digest>) -> Result<Refused> {
        let of_these = self.templates.iter().filter(|(digest, _)| digests.contains(digest));
        users_of(
            &self.store,
            of_these.filter_map(|(_, template)| template.as_ref().ok()),
            &self.condemned.mounts(),
        )
    }

    /// Makes the mounts show the templates again, or close their files of the templates if these were removed.
    fn release(&mut self, digests: &[Digest], is_removed: bool) {
        // A mount that does not respond releases the templates when it detects that this process has exited.
        self.condemned.release(digests, is_removed).unwrap_or_else(|error| log::warn!("{error}"));
    }
}

/// Returns the templates that a process uses or has leased, with an error that names the process, and the templates
/// whose use cannot be determined. Users without a process are found only by a removal.
///
/// # Errors
/// Same as [`remove`].
pub fn used(store: &Store, digests: &[Digest]) -> Result<Refused> {
    unused_of(store, digests).map(|(_, refused)| refused)
}

/// Returns the unused templates, and the used or leased templates with their errors. A template that is not in the
/// store is in neither list.
fn unused_of(store: &Store, digests: &[Digest]) -> Result<(Templates, Refused)> {
    let mut refused = control::leased(store, digests)?;
    let mut templates = Templates::new();
    let leased: BTreeSet<Digest> = refused.iter().map(|(digest, _)| *digest).collect();
    for digest in digests.iter().filter(|digest| !leased.contains(digest)) {
        match store.template(digest) {
            Ok(template) => drop(templates.insert(*digest, Ok(template))),
            Err(error) if error.code() == Code::TryAgain => refused.push((*digest, error)),
            Err(error) if store.find(digest)? => drop(templates.insert(*digest, Err(error.to_string()))),
            // The template is not in the store.
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

/// Returns an error for each template that cannot be opened, if the store has a mount that may serve it.
fn unreadable(templates: &Templates, mounts: &[Mount]) -> Refused {
    let Some(mount) = mounts.first() else { return Refused::new() };
    let error = |(digest, template): (&Digest, &std::result::Result<Template, String>)| {
        let why = template.as_ref().err()?;
        Some((*digest, may_be_in_use(digest, why, mount)))
    };
    templates.iter().filter_map(error).collect()
}

/// Returns the templates that processes or loop devices use in these mounts, with errors that name the users. All
/// processes are scanned once.
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
    let mut used: BTreeMap<Digest, Error> = using
        .into_iter()
        .map(|(digest, using)| Ok((digest, in_use(&digest, &using)?)))
        .collect::<Result<_>>()?;
    let table = procfs::mounts()?;
    // Two stores with the same content serve different files under the same digest. A mount of this store that another
    // runtime directory records is not in `mounts`, so a file is ignored only if its mount serves a store with another
    // id.
    let is_of_another_store = |path: &Path| {
        let mount = table.iter().rfind(|mount| path.starts_with(&mount.mountpoint));
        mount.is_some_and(|mount| {
            mount.fs_type == FS_TYPE
                && mounts.iter().all(|ours| ours.device != mount.dev)
                && Store::open(Path::new(&mount.source)).is_ok_and(|other| other.id() != store.id())
        })
    };
    let files = loop_devices::files().into_iter().filter(|(_, path)| !is_of_another_store(Path::new(path)));
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
                    .hint(format!("detach the device: losetup -d /dev/{device}"))
            });
        }
    }
    Ok(used.into_iter().collect())
}

/// Fails if the store is mounted and this command cannot see all processes of the host.
fn expect_to_see_all(digests: &[Digest], mounts: &[Mount]) -> Result<()> {
    let Some(mount) = mounts.first() else { return Ok(()) };
    let namespace = match (probe::in_initial_pid_namespace(), probe::in_initial_user_namespace()) {
        (true, true) => return Ok(()),
        (false, _) => "PID",
        (true, false) => "user",
    };
    Err(Error::try_again(format!(
        "this command runs in a {namespace} namespace other than the host's, where clones of {} may be invisible",
        Digest::describe_all(digests)
    ))
    .at(&mount.mountpoint)
    .hint("run the command as root of the host, outside of containers, or unmount the store first"))
}

fn used_without_process(digest: &Digest, mount: &Mount, file: &str) -> Error {
    Error::in_use(format!(
        "template {digest} is in use: the kernel holds an inode of its file '{file}', but no process uses the file"
    ))
    .at(&mount.mountpoint)
    .hint(
        "look for an overlay mount of the template, a bind mount of the file, a loop device, or a file descriptor in a \
         socket or an io_uring; see docs/explanation/removal.md for all kinds of use",
    )
}

fn may_be_in_use(digest: &Digest, why: &str, mount: &Mount) -> Error {
    Error::try_again(format!(
        "template {digest} may be in use: it cannot be opened ({why}), so the inodes of its files are unknown"
    ))
    .at(&mount.mountpoint)
    .hint(
        "import the same memory again to repair the template, or remove it while the store is not mounted: \
         stencil umount",
    )
}

fn unexpected_inode(inode: u64) -> Error {
    Error::failed(format!("a mount of the store reports inode {inode}, which was not requested"))
        .hint("replace the supervisor of the mount: stencil restart")
}

fn in_use(digest: &Digest, using: &BTreeMap<u32, &str>) -> Result<Error> {
    let maps = using.values().filter(|how| **how == "map").count();
    let opens = using.len() - maps;
    let processes = |n: usize| counted(n as u64, "process", "processes");
    let (map, open) = (if maps == 1 { "maps" } else { "map" }, if opens == 1 { "has" } else { "have" });
    let what = match (maps, opens) {
        (_, 0) => format!("{} {map} it", processes(maps)),
        (0, _) => format!("{} {open} it open", processes(opens)),
        _ => format!("{} {map} it, {opens} more {open} it open", processes(maps)),
    };
    let pids: Vec<String> = using.keys().map(u32::to_string).collect();
    let mut message = format!("template {digest} is in use: {what}: {}", pids.join(", "));
    let mut remedy = "stop these processes first; 'stencil stop' stops the clones that Stencil launched";
    for (pid, _) in using.iter().filter(|(_, how)| **how == "map") {
        if let Some(served) =
            handlers::served_by(*pid, |_, _| true)?.and_then(|serves| handlers::served_list(&serves))
        {
            message.push_str(&format!("; process {pid} handles page faults of {served}"));
            remedy = "stop the processes whose page faults are handled first: they would wait forever without the handler";
        }
    }
    Ok(Error::in_use(message).hint(remedy))
}
