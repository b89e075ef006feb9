//! Removal of tags and templates. Packs stay, because other templates may share their blocks.

use std::collections::HashSet;

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{random_hex, sync_directory};
use crate::store::names::tags::read_tag;
use crate::store::{Digest, Store, TagName, TemplateRef};

/// Result of a removal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Removed tags.
    pub tags: Vec<TagName>,
    /// The removed template, if any.
    pub digest: Option<Digest>,
    /// Remaining tags of the template, if the template was not removed.
    pub kept_tags: Vec<TagName>,
}

/// Outcome of [`Store::remove`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// The tag or template was removed.
    Done(Removed),
    /// This template would be removed: the caller must first check that the template is unused.
    Template(Digest),
}

/// Templates that were not removed, with the reason.
pub type Refused = Vec<(Digest, Error)>;

/// Returns the path to which a template's directory or a tag is renamed until its removal is confirmed. Listings skip
/// names that start with a dot.
fn aside_path(path: &StorePath) -> StorePath {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}"))
}

/// Returns the error for a template that a mount may have shown again during the removal: a mount was started, its
/// supervisor was replaced, or the mount stopped hiding the template after 15 s.
fn hiding_interrupted(digest: &Digest) -> Error {
    Error::try_again(format!(
        "template {digest} was not removed: a mount of the store may have shown the template during the removal"
    ))
    .hint("run the command again when no mount of the store is starting or restarting")
}

/// Returns the original name of a path from [`aside_path`].
fn original_name(aside: &StorePath) -> Option<&str> {
    aside.file_name()?.to_str()?.strip_prefix('.')
}

impl Store {
    /// Removes the tag or template of `reference`. If the template of a tag has other tags, only the tag is removed.
    /// The last tag is removed with its template. For a digest, the template is removed with all its tags. A template
    /// is removed only if it is `unused`, that is, if the caller has checked that the template is unused; any other
    /// template is only returned.
    ///
    /// The closures, and the handling of a template that a closure rejects, are those of
    /// [`remove_untagged`](Self::remove_untagged).
    ///
    /// # Errors
    /// Returns [`Code::NotFound`] if `reference` does not exist, the errors of both closures, or an error if a file
    /// cannot be removed. Returns [`Code::Damage`] if the template would be removed with its last tag and a tag of the
    /// store is damaged, because the damaged tag may point at the template.
    pub fn remove(
        &self,
        reference: &TemplateRef,
        unused: Option<&Digest>,
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Removal> {
        let _names = self.lock_names()?;
        self.restore_set_aside()?;
        let Some(digest) = self.removable(reference)? else {
            return self.remove_tag_only(reference, Vec::new());
        };
        let ours = self.tags()?.into_iter().filter(|t| t.digest == digest);
        let tags: Vec<TagName> =
            ours.map(|entry| TagName::new(&entry.name, &entry.tag)).collect::<Result<_>>()?;
        if let TemplateRef::Tag(tag) = reference {
            let others: Vec<TagName> = tags.iter().filter(|t| *t != tag).cloned().collect();
            if !others.is_empty() {
                return self.remove_tag_only(reference, others);
            }
            // The template is removed with its last tag, so every other tag must be readable.
            self.expect_tags_readable()?;
        }
        if unused != Some(&digest) {
            return Ok(Removal::Template(digest));
        }
        let removed = self.remove_hidden(&[(digest, tags.clone())], hidden, used);
        let removed =
            removed.and_then(|done| done.into_iter().next().map_or(Ok(false), |(_, removed)| removed));
        let restored = self.restore_set_aside();
        if let Ok(true) = removed {
            restored.unwrap_or_else(|e| log::warn!("{e}"));
            return Ok(Removal::Done(Removed { tags, digest: Some(digest), kept_tags: Vec::new() }));
        }
        match (removed, restored) {
            (removed, Ok(())) => removed.map(|_| Removal::Template(digest)),
            (Ok(_), Err(error)) => Err(error),
            (Err(why), Err(error)) => Err(why.and(error)),
        }
    }

    /// Removes those of the templates that have no tag, and returns for each whether it was removed. The tags of the
    /// store are read once, and the directory of templates is synced as often as for one template.
    ///
    /// The names lock is held throughout. `hidden` returns the templates that must stay although all mounts hide them,
    /// or `None` if a mount may show one of them. `used` is called after the templates have been set aside, and returns
    /// the templates that a process uses. Templates that are not removed are restored.
    ///
    /// # Errors
    /// Returns [`Code::Damage`] if a damaged tag may point at one of the templates. Also returns the errors of both
    /// closures, or an error if a template that was not removed cannot be restored.
    pub fn remove_untagged(
        &self,
        unused: &[Digest],
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Vec<(Digest, Result<bool>)>> {
        let _names = self.lock_names()?;
        self.restore_set_aside()?;
        self.expect_tags_readable()?;
        let untagged: HashSet<Digest> = self.untagged(unused)?.into_iter().collect();
        let (mut done, mut templates) = (Vec::new(), Vec::new());
        for &digest in unused {
            match self.find(&digest) {
                Ok(true) if untagged.contains(&digest) => templates.push((digest, Vec::new())),
                Ok(_) => done.push((digest, Ok(false))),
                Err(error) => done.push((digest, Err(error))),
            }
        }
        let removed = self.remove_hidden(&templates, hidden, used);
        match (removed, self.restore_set_aside()) {
            (Ok(removed), restored) => {
                // A completed removal is reported even if another template cannot be restored; the next writer restores
                // it.
                restored.unwrap_or_else(|e| log::warn!("{e}"));
                let report = |(digest, is_removed): (Digest, Result<bool>)| match is_removed {
                    Ok(false) => (digest, Err(hiding_interrupted(&digest))),
                    removed => (digest, removed),
                };
                done.extend(removed.into_iter().map(report));
                Ok(done)
            }
            (Err(error), Ok(())) => Err(error),
            (Err(why), Err(error)) => Err(why.and(error)),
        }
    }

    /// Returns those of the templates that have no tag.
    ///
    /// # Errors
    /// Returns an error if the tags cannot be listed.
    pub fn untagged(&self, digests: &[Digest]) -> Result<Vec<Digest>> {
        let tagged: HashSet<Digest> = self.tags()?.into_iter().map(|entry| entry.digest).collect();
        Ok(digests.iter().filter(|digest| !tagged.contains(digest)).copied().collect())
    }

    /// Removes templates and all their tags. Returns for each template whether it was removed: false if a mount may
    /// show it. The caller restores templates that were set aside and not removed (`restore_set_aside`).
    fn remove_hidden(
        &self,
        templates: &[(Digest, Vec<TagName>)],
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Vec<(Digest, Result<bool>)>> {
        let mut remaining: Vec<Digest> = templates.iter().map(|(digest, _)| *digest).collect();
        let mut done: Vec<(Digest, Result<bool>)> = Vec::new();
        let mut refuse = |remaining: &mut Vec<Digest>, refused: Option<Refused>| match refused {
            Some(mut refused) => {
                refused.retain(|(digest, _)| remaining.contains(digest));
                remaining.retain(|digest| refused.iter().all(|(other, _)| other != digest));
                done.extend(refused.into_iter().map(|(digest, error)| (digest, Err(error))));
            }
            None => done.extend(remaining.drain(..).map(|digest| (digest, Ok(false)))),
        };
        let refused = hidden(&remaining)?;
        refuse(&mut remaining, refused);
        let unused = templates.iter().filter(|(digest, _)| remaining.contains(digest));
        let refused = self.set_aside(unused)?;
        refuse(&mut remaining, Some(refused));
        // After the templates were set aside, no process can open one during the search.
        let refused = used(&remaining)?;
        refuse(&mut remaining, Some(refused));
        let refused = hidden(&remaining)?;
        refuse(&mut remaining, refused);
        done.extend(self.delete_set_aside(&remaining));
        Ok(done)
    }

    /// Renames templates and their tags to names that listings skip, and returns the templates that cannot be renamed.
    /// Neither renaming nor restoring needs disk space.
    fn set_aside<'a>(&self, templates: impl Iterator<Item = &'a (Digest, Vec<TagName>)>) -> Result<Refused> {
        let mut refused = Refused::new();
        for (digest, tags) in templates {
            if let Err(error) = self.set_one_aside(digest, tags) {
                refused.push((*digest, error));
            }
        }
        sync_directory(&self.images_dir())?;
        Ok(refused)
    }

    fn set_one_aside(&self, digest: &Digest, tags: &[TagName]) -> Result<()> {
        // Tags first, so that no tag ever points at a missing template.
        for tag in tags {
            let path = self.tag_path(tag);
            path.rename(&aside_path(&path)).map_err(|e| path.error("cannot remove tag", e))?;
            sync_directory(&self.tags_dir().join(tag.name()))?;
        }
        let directory = self.image_dir(digest);
        directory.rename(&aside_path(&directory)).map_err(|e| directory.error("cannot remove template", e))
    }

    /// Removes templates that were set aside, and returns for each whether it was removed. A template is first renamed
    /// to `tmp/`, so that no partly removed template can be restored.
    fn delete_set_aside(&self, digests: &[Digest]) -> Vec<(Digest, Result<bool>)> {
        let mut trees = Vec::new();
        let mut delete = |digest: &Digest| {
            let (aside, tree) = (aside_path(&self.image_dir(digest)), self.tmp_dir().join(random_hex()?));
            aside.rename(&tree).map_err(|e| aside.error("cannot remove template", e))?;
            trees.push(tree);
            Ok(true)
        };
        let done = digests.iter().map(|digest| (*digest, delete(digest))).collect();
        // The next writer removes what remains of the trees.
        sync_directory(&self.images_dir()).unwrap_or_else(|e| log::warn!("{e}"));
        trees.iter().for_each(|tree| drop(tree.remove_tree()));
        done
    }

    fn aside_paths_in(&self, directory: &StorePath) -> Result<Vec<StorePath>> {
        let names = directory.names().map_err(|e| self.outage_or(directory.error("cannot list", e)))?;
        let mut aside: Vec<StorePath> = names.iter().map(|name| directory.join(name)).collect();
        aside.retain(|path| original_name(path).is_some());
        Ok(aside)
    }

    /// Restores templates and tags that an unfinished removal has set aside, because they may be in use. The caller
    /// holds the names lock.
    ///
    /// # Errors
    /// Returns an error if a file cannot be restored. The file stays set aside, and the next call tries again.
    pub(in crate::store) fn restore_set_aside(&self) -> Result<()> {
        let fail = |path: &StorePath, e| {
            Error::io("cannot undo the unfinished removal", path, e)
                .hint("make the path writable, then run 'stencil gc' to restore the hidden file")
        };
        // A template that cannot be restored does not block the others, and its tags stay set aside.
        let (mut restored, mut stuck) = (Ok(()), HashSet::new());
        for aside in self.aside_paths_in(&self.images_dir())? {
            let Some(digest) = original_name(&aside).and_then(|name| name.parse::<Digest>().ok()) else {
                continue;
            };
            let directory = self.image_dir(&digest);
            let done = match self.has(&digest) {
                // The template was imported again.
                true => self.delete_set_aside(&[digest]).into_iter().try_for_each(|(_, done)| done.map(drop)),
                false => aside.rename(&directory).map_err(|e| fail(&directory, e)),
            };
            if done.is_err() {
                stuck.insert(digest);
            }
            restored = restored.and(done).and(sync_directory(&self.images_dir()));
        }
        for name in self.names(&self.tags_dir())? {
            let directory = self.tags_dir().join(&name);
            let set_aside = self.aside_paths_in(&directory)?;
            for aside in &set_aside {
                let Some(tag) = original_name(aside).and_then(|tag| TagName::new(&name, tag).ok()) else {
                    continue;
                };
                let path = self.tag_path(&tag);
                let done = match read_tag(aside) {
                    Err(e) => Err(e),
                    Ok(Some(digest)) if stuck.contains(&digest) => Ok(()),
                    Ok(Some(digest)) if self.has(&digest) && !path.is_file() => aside.rename(&path),
                    Ok(_) => aside.remove_file(),
                };
                restored = restored.and(done.map_err(|e| fail(&path, e)));
            }
            if !set_aside.is_empty() {
                restored = restored.and(sync_directory(&directory));
                // Fails, as intended, if the name has other tags.
                let _ = directory.remove_folder();
            }
        }
        restored
    }

    /// Checks that a tag or template can be removed by this reference.
    ///
    /// # Errors
    /// Same as [`Store::resolve`], except that a dangling or damaged tag can be removed.
    pub fn expect_removable(&self, reference: &TemplateRef) -> Result<()> {
        // Another removal may have set the template aside.
        let _names = self.lock_names()?;
        self.restore_set_aside()?;
        self.removable(reference).map(drop)
    }

    /// Returns the template of the reference; `None` if only the tag can be removed, because it is dangling or damaged.
    fn removable(&self, reference: &TemplateRef) -> Result<Option<Digest>> {
        let TemplateRef::Tag(tag) = reference else { return self.resolve(reference).map(Some) };
        match self.tag(tag) {
            Ok(Some(digest)) => Ok(Some(digest).filter(|digest| self.has(digest))),
            // Returns the error for an unknown tag.
            Ok(None) => self.resolve(reference).map(Some),
            Err(e) if e.code() == Code::Damage => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn remove_tag_only(&self, reference: &TemplateRef, kept_tags: Vec<TagName>) -> Result<Removal> {
        let TemplateRef::Tag(tag) = reference else { return Ok(Removal::Done(Removed::default())) };
        self.remove_tag_locked(tag)?;
        Ok(Removal::Done(Removed { tags: vec![tag.clone()], digest: None, kept_tags }))
    }
}

#[cfg(test)]
mod tests;
