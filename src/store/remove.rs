//! Removal of tags and templates. Packs stay: blocks may be shared.

use std::collections::HashSet;

use serde::Serialize;

use super::path::StorePath;
use super::publish::{random_hex, sync_folder};
use super::tags::read_tag;
use super::{Digest, Store, TagName, TemplateRef};
use crate::error::{Code, Error, Result};

/// What a removal has taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Tags that are gone.
    pub tags: Vec<TagName>,
    /// The template, when it is gone too.
    pub template: Option<Digest>,
    /// Tags that it stays under, when it is not.
    pub kept_tags: Vec<TagName>,
}

/// How far a removal has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// That is gone.
    Done(Removed),
    /// This template would go: see first that nobody uses it.
    Template(Digest),
}

/// Templates that are not removed, and why.
pub type Refused = Vec<(Digest, Error)>;

/// Where a template's folder, or a tag, is until its removal is certain: no list shows what begins with a dot.
fn grave_of(path: &StorePath) -> StorePath {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}"))
}

/// While the template was hidden, a mount of the store began, got another supervisor, or ended its hiding after 15 s.
fn shown_again(digest: &Digest) -> Error {
    Error::try_again(format!(
        "template {digest} stays: a mount of the store may have shown it during the removal"
    ))
    .remedy("run it again when no mount begins or restarts")
}

/// The name of what lies in that grave.
fn buried(grave: &StorePath) -> Option<&str> {
    grave.file_name()?.to_str()?.strip_prefix('.')
}

impl Store {
    /// Removes what `reference` names: a tag of a template that has others goes alone, the last tag takes the template
    /// along, a digest takes all its tags along. A template goes only if it is `unused`, of which the caller knows that
    /// nobody uses it; any other template is only named.
    ///
    /// Both closures, and what happens to a template that they refuse, are those of
    /// [`remove_untagged`](Self::remove_untagged).
    ///
    /// # Errors
    /// [`Code::NotFound`], the errors of both closures, or when a file cannot be removed. [`Code::Damage`] if a tag
    /// of the store is damaged and the template would go with its last tag: the damaged tag may point to it.
    pub fn remove(
        &self,
        reference: &TemplateRef,
        unused: Option<&Digest>,
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Removal> {
        let _names = self.lock_names()?;
        self.settle_graves()?;
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
            // The last one takes the template along: it must be the last one for certain.
            self.expect_tags_readable()?;
        }
        if unused != Some(&digest) {
            return Ok(Removal::Template(digest));
        }
        let removed = self.remove_hidden(&[(digest, tags.clone())], hidden, used);
        let removed =
            removed.and_then(|done| done.into_iter().next().map_or(Ok(false), |(_, removed)| removed));
        let settled = self.settle_graves();
        if let Ok(true) = removed {
            settled.unwrap_or_else(|e| log::warn!("{e}"));
            return Ok(Removal::Done(Removed { tags, template: Some(digest), kept_tags: Vec::new() }));
        }
        match (removed, settled) {
            (removed, Ok(())) => removed.map(|_| Removal::Template(digest)),
            (Ok(_), Err(error)) => Err(error),
            (Err(why), Err(error)) => Err(why.and(error)),
        }
    }

    /// Removes those of the templates that have no tag, and gives for each whether it is gone. The tags of the store are
    /// read once, and its folder of templates is synced as often as for one template.
    ///
    /// The lock of names is held throughout. `hidden` gives the templates that must stay although all mounts hide them, or
    /// `None` if a mount may show one of them. `used` runs after the templates have left the store, and gives those that a
    /// process uses. What is not removed is restored.
    ///
    /// # Errors
    /// [`Code::Damage`] if a damaged tag may be a tag of one of them; the errors of both closures; or when what was not
    /// removed cannot be restored.
    pub fn remove_untagged(
        &self,
        unused: &[Digest],
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Vec<(Digest, Result<bool>)>> {
        let _names = self.lock_names()?;
        self.settle_graves()?;
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
        match (removed, self.settle_graves()) {
            (Ok(removed), settled) => {
                // What is removed is told even if another template cannot be restored: the next writer restores it.
                settled.unwrap_or_else(|e| log::warn!("{e}"));
                let shown = |(digest, is_removed): (Digest, Result<bool>)| match is_removed {
                    Ok(false) => (digest, Err(shown_again(&digest))),
                    removed => (digest, removed),
                };
                done.extend(removed.into_iter().map(shown));
                Ok(done)
            }
            (Err(error), Ok(())) => Err(error),
            (Err(why), Err(error)) => Err(why.and(error)),
        }
    }

    /// Those of the templates that no tag points to.
    ///
    /// # Errors
    /// When the tags cannot be listed.
    pub fn untagged(&self, digests: &[Digest]) -> Result<Vec<Digest>> {
        let tagged: HashSet<Digest> = self.tags()?.into_iter().map(|entry| entry.digest).collect();
        Ok(digests.iter().filter(|digest| !tagged.contains(digest)).copied().collect())
    }

    /// Removes templates and all their tags; gives for each whether it is gone: false if a mount may show it. Templates that
    /// are buried and not gone are restored by the caller (`settle_graves`).
    fn remove_hidden(
        &self,
        templates: &[(Digest, Vec<TagName>)],
        hidden: impl Fn(&[Digest]) -> Result<Option<Refused>>,
        used: impl Fn(&[Digest]) -> Result<Refused>,
    ) -> Result<Vec<(Digest, Result<bool>)>> {
        let mut left: Vec<Digest> = templates.iter().map(|(digest, _)| *digest).collect();
        let mut done: Vec<(Digest, Result<bool>)> = Vec::new();
        let mut refuse = |left: &mut Vec<Digest>, refused: Option<Refused>| match refused {
            Some(mut refused) => {
                refused.retain(|(digest, _)| left.contains(digest));
                left.retain(|digest| refused.iter().all(|(other, _)| other != digest));
                done.extend(refused.into_iter().map(|(digest, error)| (digest, Err(error))));
            }
            None => done.extend(left.drain(..).map(|digest| (digest, Ok(false)))),
        };
        let refused = hidden(&left)?;
        refuse(&mut left, refused);
        let unused = templates.iter().filter(|(digest, _)| left.contains(digest));
        let refused = self.bury(unused)?;
        refuse(&mut left, Some(refused));
        // After the burial: nobody can have opened a template during the search.
        let refused = used(&left)?;
        refuse(&mut left, Some(refused));
        let refused = hidden(&left)?;
        refuse(&mut left, refused);
        done.extend(self.forget(&left));
        Ok(done)
    }

    /// Moves templates and their tags to where no list has them, and gives those that cannot be moved. That takes no room,
    /// and neither does the way back.
    fn bury<'a>(&self, templates: impl Iterator<Item = &'a (Digest, Vec<TagName>)>) -> Result<Refused> {
        let mut refused = Refused::new();
        for (digest, tags) in templates {
            if let Err(error) = self.bury_one(digest, tags) {
                refused.push((*digest, error));
            }
        }
        sync_folder(&self.images_dir())?;
        Ok(refused)
    }

    fn bury_one(&self, digest: &Digest, tags: &[TagName]) -> Result<()> {
        // Tags first: there is never a name without a template.
        for tag in tags {
            let path = self.tag_path(tag);
            path.rename(&grave_of(&path)).map_err(|e| path.error("cannot remove tag", e))?;
            sync_folder(&self.tags_dir().join(tag.name()))?;
        }
        let folder = self.image_dir(digest);
        folder.rename(&grave_of(&folder)).map_err(|e| folder.error("cannot remove the template", e))
    }

    /// Removes buried templates; gives for each whether it is gone. Each goes in one step: none is restored in parts.
    fn forget(&self, digests: &[Digest]) -> Vec<(Digest, Result<bool>)> {
        let mut trees = Vec::new();
        let mut forget = |digest: &Digest| {
            let (grave, tree) = (grave_of(&self.image_dir(digest)), self.tmp_dir().join(random_hex()?));
            grave.rename(&tree).map_err(|e| grave.error("cannot remove the template", e))?;
            trees.push(tree);
            Ok(true)
        };
        let done = digests.iter().map(|digest| (*digest, forget(digest))).collect();
        // The next writer sweeps what is left of the trees.
        sync_folder(&self.images_dir()).unwrap_or_else(|e| log::warn!("{e}"));
        trees.iter().for_each(|tree| drop(tree.remove_tree()));
        done
    }

    fn graves_in(&self, folder: &StorePath) -> Result<Vec<StorePath>> {
        let names = folder.names().map_err(|e| self.blame(folder.error("cannot list", e)))?;
        let mut graves: Vec<StorePath> = names.iter().map(|name| folder.join(name)).collect();
        graves.retain(|path| buried(path).is_some());
        Ok(graves)
    }

    /// Puts back what a removal that has not ended has buried: it may be in use. The caller holds the lock of names.
    ///
    /// # Errors
    /// When something cannot be put back: it stays where it is, for the next time.
    pub(super) fn settle_graves(&self) -> Result<()> {
        let fail = |path: &StorePath, e| {
            Error::io("cannot put back what may be in use", path, e)
                .remedy("it is still there, hidden: once that path can be written, `stencil gc` puts it back")
        };
        // One that cannot be restored is in no other's way, and keeps its tags.
        let (mut settled, mut stuck) = (Ok(()), HashSet::new());
        for grave in self.graves_in(&self.images_dir())? {
            let Some(digest) = buried(&grave).and_then(|name| name.parse::<Digest>().ok()) else { continue };
            let folder = self.image_dir(&digest);
            let done = match self.has(&digest) {
                // It was imported again.
                true => self.forget(&[digest]).into_iter().try_for_each(|(_, done)| done.map(drop)),
                false => grave.rename(&folder).map_err(|e| fail(&folder, e)),
            };
            if done.is_err() {
                stuck.insert(digest);
            }
            settled = settled.and(done).and(sync_folder(&self.images_dir()));
        }
        for name in self.names(&self.tags_dir())? {
            let folder = self.tags_dir().join(&name);
            let graves = self.graves_in(&folder)?;
            for grave in &graves {
                let Some(tag) = buried(grave).and_then(|tag| TagName::new(&name, tag).ok()) else { continue };
                let path = self.tag_path(&tag);
                let done = match read_tag(grave) {
                    Err(e) => Err(e),
                    Ok(Some(digest)) if stuck.contains(&digest) => Ok(()),
                    Ok(Some(digest)) if self.has(&digest) && !path.is_file() => grave.rename(&path),
                    Ok(_) => grave.remove_file(),
                };
                settled = settled.and(done.map_err(|e| fail(&path, e)));
            }
            if !graves.is_empty() {
                settled = settled.and(sync_folder(&folder));
                // Fails while other tags of the name are there, and that is right.
                let _ = folder.remove_folder();
            }
        }
        settled
    }

    /// Fails where there is nothing that these words mean.
    ///
    /// # Errors
    /// As [`Store::resolve`]; a tag that points nowhere, or is damaged, can be removed.
    pub fn expect_removable(&self, reference: &TemplateRef) -> Result<()> {
        // What another removal has buried may come back.
        let _names = self.lock_names()?;
        self.settle_graves()?;
        self.removable(reference).map(drop)
    }

    /// The template that these words mean; nothing for a tag beside which there is nothing to remove.
    fn removable(&self, reference: &TemplateRef) -> Result<Option<Digest>> {
        let TemplateRef::Tag(tag) = reference else { return self.resolve(reference).map(Some) };
        match self.tag(tag) {
            Ok(Some(digest)) => Ok(Some(digest).filter(|digest| self.has(digest))),
            // It says that there is none.
            Ok(None) => self.resolve(reference).map(Some),
            Err(e) if e.code() == Code::Damage => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn remove_tag_only(&self, reference: &TemplateRef, kept_tags: Vec<TagName>) -> Result<Removal> {
        let TemplateRef::Tag(tag) = reference else { return Ok(Removal::Done(Removed::default())) };
        self.remove_tag_locked(tag)?;
        Ok(Removal::Done(Removed { tags: vec![tag.clone()], template: None, kept_tags }))
    }
}

#[cfg(test)]
mod tests;
