//! Publishes the files that a session has written: packs, then images, then tags.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

use super::block_index::BlockIndex;
use super::pack_writer::Packed;
use crate::error::{Code, Error, Result};
use crate::store::disk::lock::Lock;
use crate::store::disk::pack::pack_path;
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{publish, sync_directory, write_new};
use crate::store::disk::session::Session;
use crate::store::format::placement::Front;
use crate::store::names::policy::DEFAULT_MODE;
use crate::store::{Digest, Moved, Policy, Store, TagName};

/// A template whose tables are complete in a directory of the session.
pub(in crate::store) struct Finished<'a> {
    pub digest: Digest,
    /// Directory that holds `image` and `placement`.
    pub directory: StorePath,
    /// Policy to store, after `change` is applied, if the store has no intact policy of this template.
    pub policy: Policy,
    /// Change to apply to the policy, whether the store's or this one.
    pub change: &'a dyn Fn(&mut Policy),
    pub tags: Vec<TagName>,
}

/// Result of publishing one template.
#[derive(Debug)]
pub(in crate::store) struct Committed {
    /// True if the store already had this content.
    pub existed: bool,
    /// Tags that pointed at another template before.
    pub moved: Vec<Moved>,
}

/// Publishes `templates`. A template that the store already has intact only gets its policy and tags changed. Returns
/// the result for each template, and whether the new packs were published: if the store has every template intact, the
/// new packs are deleted with the session.
///
/// An error after the first visible step lists what was published. Every step leaves only complete files.
pub(in crate::store) fn commit(
    store: &Store,
    session: &Session,
    packed: &Packed,
    templates: &[Finished<'_>],
    index: &BlockIndex,
    check_interrupt: &dyn Fn() -> Result<()>,
) -> Result<(Vec<Committed>, bool)> {
    for template in templates {
        let mut policy = template.policy.clone();
        (template.change)(&mut policy);
        write_new(&template.directory.join("policy"), &policy.encode()?)?;
        sync_directory(&template.directory)?;
    }
    let (names, found) = inspect_and_lock(store, templates, index, check_interrupt)?;
    let existed: Vec<bool> = found.iter().map(|found| found.state != StoreState::Missing).collect();
    let needs_tables: Vec<bool> = found.iter().map(|found| !found.is_intact).collect();
    let needs_packs = needs_tables.contains(&true);
    let mut visible = Published::default();
    let mut publish_all = || {
        if needs_packs {
            for id in &packed.packs {
                publish(&pack_path(session.path(), *id), &store.packs().path(*id))?;
                visible.packs += 1;
            }
            sync_directory(&store.packs_dir())?;
        }
        for ((template, existed), needs_tables) in templates.iter().zip(&existed).zip(&needs_tables) {
            match existed {
                true => update(store, template, *needs_tables)?,
                false => publish(&template.directory, &store.image_dir(&template.digest))?,
            }
            visible.templates += 1;
        }
        sync_directory(&store.images_dir())?;
        let mut former = Vec::with_capacity(templates.len());
        for template in templates {
            former.push(set_tags(store, template, &names, &mut visible.tags)?);
        }
        // Described after the last tag was set, because a later template may get a tag of the same load.
        let committed = |(existed, former)| Committed { existed, moved: store.moved(former) };
        Ok(existed.iter().copied().zip(former).map(committed).collect())
    };
    let done = publish_all();
    done.map(|done| (done, needs_packs)).map_err(|e| visible.describe(e))
}

/// Counts of the files that an unfinished commit has already published.
#[derive(Default)]
struct Published {
    packs: usize,
    templates: usize,
    tags: usize,
}

impl Published {
    fn describe(&self, error: Error) -> Error {
        let Published { packs, templates, tags } = self;
        if packs + templates + tags == 0 {
            return error;
        }
        let full = [Errno::NOSPC, Errno::DQUOT].iter().any(|full| error.errno() == Some(full.raw_os_error()));
        let first = if full { "free space on that file system" } else { "fix the cause" };
        error
            .context(format!("the commit stopped (packs published: {packs}, templates: {templates}, tags: {tags})"))
            .hint(format!(
                "{first}, then run the command again, which reuses the published data; or remove that data: run \
                 'stencil rm DIGEST' for each template, then 'stencil gc'"
            ))
    }
}

/// Updates a template that the store already has: changes its policy, and replaces its tables if `needs_tables` is set.
fn update(store: &Store, template: &Finished<'_>, needs_tables: bool) -> Result<()> {
    let target = store.image_dir(&template.digest);
    if needs_tables {
        // Both images have the same digest, so either placement fits either image file.
        for name in ["image", "placement"] {
            publish(&template.directory.join(name), &target.join(name))?;
        }
    }
    match store.set_policy_locked(&template.digest, template.change) {
        Err(e) if e.code() == Code::Damage || e.code() == Code::NotFound => {
            log::warn!("{e}; replacing the policy");
            publish(&template.directory.join("policy"), &target.join("policy"))?;
        }
        other => other?,
    }
    sync_directory(&target)
}

fn set_tags(
    store: &Store,
    template: &Finished<'_>,
    _names: &Lock,
    count: &mut usize,
) -> Result<Vec<(TagName, Digest)>> {
    let mut moved = Vec::new();
    for tag in &template.tags {
        let former = store.set_tag_locked(tag, &template.digest)?;
        *count += 1;
        moved.extend(former.map(|former| (tag.clone(), former)));
    }
    Ok(moved)
}

/// State of one template in the store.
#[derive(Debug, Clone, PartialEq)]
enum StoreState {
    Missing,
    Unreadable,
    Template(Front),
}

impl StoreState {
    fn read(store: &Store, digest: &Digest) -> StoreState {
        match store.template(digest) {
            Ok(template) => StoreState::Template(template.front()),
            Err(_) if store.has(digest) => StoreState::Unreadable,
            Err(_) => StoreState::Missing,
        }
    }
}

/// State of a template in the store, and whether all of its data can be read.
#[derive(Debug)]
struct Inspected {
    state: StoreState,
    is_intact: bool,
}

impl Inspected {
    /// Reads all data that the store's template references and the new template does not. The data that both reference
    /// was read or written by this import, or is unchanged data of a diff's base, which no import reads.
    fn inspect(store: &Store, new: &Finished<'_>, index: &BlockIndex) -> Inspected {
        let state = StoreState::read(store, &new.digest);
        let read = || {
            let template = store.template(&new.digest)?;
            template.check()?;
            template.unreadable_unlike(&new.directory.join("placement"))
        };
        let is_intact = match &state {
            StoreState::Missing => false,
            StoreState::Unreadable | StoreState::Template(_) => match read() {
                Ok(unreadable) => {
                    let is_intact = unreadable.is_empty();
                    index.add_repaired(unreadable);
                    is_intact
                }
                Err(e) => {
                    log::warn!("{e}; repairing the template");
                    false
                }
            },
        };
        Inspected { state, is_intact }
    }
}

/// Limit on attempts to inspect a template that other imports keep replacing; after the last one this import replaces
/// the template too.
const MAX_INSPECTIONS: usize = 5;

/// Inspects the store's copies of these templates, then takes the names lock and checks that the store still has the
/// inspected state. The names lock is held only for short times, so no block is read under it.
fn inspect_and_lock(
    store: &Store,
    templates: &[Finished<'_>],
    index: &BlockIndex,
    check_interrupt: &dyn Fn() -> Result<()>,
) -> Result<(Lock, Vec<Inspected>)> {
    let mut inspections = 0;
    loop {
        inspections += 1;
        let mut found: Vec<Inspected> =
            templates.iter().map(|new| Inspected::inspect(store, new, index)).collect();
        let names = store.lock_names_while(check_interrupt)?;
        let mut changed = false;
        for (found, new) in found.iter_mut().zip(templates) {
            let state = StoreState::read(store, &new.digest);
            if state != found.state {
                *found = Inspected { state, is_intact: false };
                changed = true;
            }
        }
        if !changed || inspections == MAX_INSPECTIONS {
            return Ok((names, found));
        }
    }
}

/// Returns the default policy of a template that this user adds to a store now.
pub(in crate::store) fn fresh_policy() -> Policy {
    Policy {
        mode: DEFAULT_MODE,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        labels: Default::default(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        recipe: None,
        working_sets: Default::default(),
        unknown: Default::default(),
    }
}
