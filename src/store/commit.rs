//! Publishes what a session has written: packs, then images, then tags.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

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
    repaired: u64,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<(Vec<Committed>, bool)> {
    for template in templates {
        let mut policy = template.policy.clone();
        (template.change)(&mut policy);
        write_new(&template.folder.join("policy"), &policy.encode()?)?;
        sync_folder(&template.folder)?;
    }
    let names = store.lock_names_while(go_on)?;
    let existed: Vec<bool> = templates.iter().map(|t| store.has(&t.digest)).collect();
    let needed: Vec<bool> = templates
        .iter()
        .zip(&existed)
        .map(|(t, existed)| !existed || repaired > 0 || !is_sound(store, &t.digest))
        .collect();
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

/// True when the tables of a template and the headers and indexes of its packs are undamaged. Its
/// blocks were read when they were met.
fn is_sound(store: &Store, digest: &Digest) -> bool {
    store.template(digest).and_then(|t| t.check()).inspect_err(|e| log::warn!("{e}; repairing")).is_ok()
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
