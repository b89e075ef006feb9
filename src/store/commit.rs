//! Publishes what a session has written: packs, then images, then tags.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use super::format::placement::Front;
use super::known::Known;
use super::lock::Lock;
use super::pack::pack_path;
use super::pack_writer::Packed;
use super::path::StorePath;
use super::policy::DEFAULT_MODE;
use super::publish::{publish, sync_folder, write_new};
use super::session::Session;
use super::{Digest, Policy, Store, TagName};
use crate::error::{Code, Error, Result};

/// A template whose tables are complete in a folder of the session.
pub(super) struct Finished<'a> {
    pub digest: Digest,
    /// Holds `image` and `placement`.
    pub folder: StorePath,
    /// What the store gets when it has no sound policy of this template; before `change`.
    pub policy: Policy,
    /// What is asked for, whatever the store has.
    pub change: &'a dyn Fn(&mut Policy),
    pub tags: Vec<TagName>,
}

/// What became of one of them.
#[derive(Debug)]
pub(super) struct Committed {
    /// The store had this content already.
    pub existed: bool,
    /// Where tags pointed before, of those that pointed elsewhere.
    pub moved: Vec<(TagName, Digest)>,
}

/// Publishes all of `templates`, or what of them the store lacks. Gives what became of each, and whether the new packs
/// were needed: when sound templates with this content are there, they go away with the session.
///
/// An error after the first step that can be seen says how far it came: every step leaves only what is whole.
pub(super) fn commit(
    store: &Store,
    session: &Session,
    packed: &Packed,
    templates: &[Finished<'_>],
    known: &Known,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<(Vec<Committed>, bool)> {
    for template in templates {
        let mut policy = template.policy.clone();
        (template.change)(&mut policy);
        write_new(&template.folder.join("policy"), &policy.encode()?)?;
        sync_folder(&template.folder)?;
    }
    let (names, found) = look(store, templates, known, go_on)?;
    let existed: Vec<bool> = found.iter().map(|found| found.there != There::Nothing).collect();
    let needed: Vec<bool> = found.iter().map(|found| !found.is_sound).collect();
    let any = needed.contains(&true);
    let mut seen = Seen::default();
    let mut publish_all = || {
        if any {
            for id in &packed.packs {
                publish(&pack_path(session.path(), *id), &store.packs().path(*id))?;
                seen.packs += 1;
            }
            sync_folder(&store.packs_dir())?;
        }
        for ((template, existed), needed) in templates.iter().zip(&existed).zip(&needed) {
            match existed {
                true => replace(store, template, *needed)?,
                false => publish(&template.folder, &store.image_dir(&template.digest))?,
            }
            seen.templates += 1;
        }
        sync_folder(&store.images_dir())?;
        let mut done = Vec::with_capacity(templates.len());
        for (template, existed) in templates.iter().zip(&existed) {
            let moved = point(store, template, &names, &mut seen.tags)?;
            done.push(Committed { existed: *existed, moved });
        }
        Ok(done)
    };
    let done = publish_all();
    done.map(|done| (done, any)).map_err(|e| seen.told(e))
}

/// What others can see of an unfinished commit.
#[derive(Default)]
struct Seen {
    packs: usize,
    templates: usize,
    tags: usize,
}

impl Seen {
    fn told(&self, error: Error) -> Error {
        let Seen { packs, templates, tags } = self;
        if packs + templates + tags == 0 {
            return error;
        }
        let full = [Errno::NOSPC, Errno::DQUOT].iter().any(|full| error.errno() == Some(full.raw_os_error()));
        let first = if full { "free space on that filesystem" } else { "mend the cause" };
        error
            .context(format!("packs published: {packs}, templates: {templates}, tags: {tags}, all of them whole; then"))
            .remedy(format!(
                "{first}, then run it again: it uses what is there; or give that back: stencil rm takes templates by digest, \
                 stencil gc what no template needs"
            ))
    }
}

/// The store has a template of that digest: its policy is changed, and its tables are replaced where they are needed.
fn replace(store: &Store, template: &Finished<'_>, needed: bool) -> Result<()> {
    let target = store.image_dir(&template.digest);
    if needed {
        // The image is the same by its digest, so that either placement fits either file.
        for name in ["image", "placement"] {
            publish(&template.folder.join(name), &target.join(name))?;
        }
    }
    match store.set_policy_locked(&template.digest, template.change) {
        Err(e) if e.code() == Code::Damage || e.code() == Code::NotFound => {
            log::warn!("{e}; it is written anew");
            publish(&template.folder.join("policy"), &target.join("policy"))?;
        }
        other => other?,
    }
    sync_folder(&target)
}

fn point(
    store: &Store,
    template: &Finished<'_>,
    _names: &Lock,
    count: &mut usize,
) -> Result<Vec<(TagName, Digest)>> {
    let mut moved = Vec::new();
    for tag in &template.tags {
        let before = store.tag(tag).ok().flatten().filter(|before| *before != template.digest);
        store.set_tag_locked(tag, &template.digest)?;
        *count += 1;
        moved.extend(before.map(|before| (tag.clone(), before)));
    }
    Ok(moved)
}

/// What a store has of a template.
#[derive(Debug, Clone, PartialEq)]
enum There {
    Nothing,
    Unreadable,
    Template(Front),
}

impl There {
    fn now(store: &Store, digest: &Digest) -> There {
        match store.template(digest) {
            Ok(template) => There::Template(template.front()),
            Err(_) if store.has(digest) => There::Unreadable,
            Err(_) => There::Nothing,
        }
    }
}

/// What was found of a template, and whether all of it can be read.
#[derive(Debug)]
struct Found {
    there: There,
    is_sound: bool,
}

impl Found {
    /// Reads all that the store's template relies on and the new one does not: this import has read or written the rest.
    fn look(store: &Store, new: &Finished<'_>, known: &Known) -> Found {
        let there = There::now(store, &new.digest);
        let read = || {
            let template = store.template(&new.digest)?;
            template.check()?;
            template.unreadable_beside(&new.folder.join("placement"))
        };
        let is_sound = match &there {
            There::Nothing => false,
            There::Unreadable | There::Template(_) => match read() {
                Ok(unreadable) => {
                    let is_sound = unreadable.is_empty();
                    known.add_repaired(unreadable);
                    is_sound
                }
                Err(e) => {
                    log::warn!("{e}; repairing");
                    false
                }
            },
        };
        Found { there, is_sound }
    }
}

/// A template that other imports go on replacing is replaced by this one too.
const MAX_LOOKS: usize = 5;

/// Looks at what the store has of these templates, and takes the lock of names while it still has just that: the lock is
/// held for moments, so no block is read under it.
fn look(
    store: &Store,
    templates: &[Finished<'_>],
    known: &Known,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<(Lock, Vec<Found>)> {
    let mut looks = 0;
    loop {
        looks += 1;
        let mut found: Vec<Found> = templates.iter().map(|new| Found::look(store, new, known)).collect();
        let names = store.lock_names_while(go_on)?;
        let mut changed = false;
        for (found, new) in found.iter_mut().zip(templates) {
            let there = There::now(store, &new.digest);
            if there != found.there {
                *found = Found { there, is_sound: false };
                changed = true;
            }
        }
        if !changed || looks == MAX_LOOKS {
            return Ok((names, found));
        }
    }
}

/// The policy of a template that comes into a store now, by this user.
pub(super) fn fresh_policy() -> Policy {
    Policy {
        mode: DEFAULT_MODE,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        labels: Default::default(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        recipe: None,
        unknown: Default::default(),
    }
}
