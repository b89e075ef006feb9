//! Removal of tags and templates. Packs stay: blocks may be shared.

use std::fs;

use serde::Serialize;

use super::publish::{Session, sync_folder};
use super::{Digest, Store, TagName, TemplateRef};
use crate::error::{Code, Error, Result};

/// What a removal has taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Tags that are gone.
    pub tags: Vec<TagName>,
    /// The template, when it is gone too.
    pub template: Option<Digest>,
}

/// What is to be removed.
#[derive(Debug, Clone, Copy)]
pub enum What<'a> {
    /// What these words mean: a tag of a template that has others goes alone, the last tag takes the template along,
    /// a digest takes all its tags along.
    Named(&'a TemplateRef),
    /// A template, unless it has a tag.
    Untagged(&'a Digest),
}

/// How far a removal has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// That is gone.
    Done(Removed),
    /// This template would go: see first that nobody uses it.
    Template(Digest),
}

impl Store {
    /// Removes tags, and with them the template `unused`, of which the caller knows that nobody uses it. Any other
    /// template is only named. `last_look` is asked before the template goes, while no name can change: whether that
    /// is still so.
    ///
    /// # Errors
    /// [`Code::NotFound`], what `last_look` says, or when a file cannot be removed.
    pub fn remove(
        &self,
        what: What<'_>,
        unused: Option<&Digest>,
        last_look: impl FnOnce() -> Result<bool>,
    ) -> Result<Removal> {
        let _names = self.lock_names()?;
        let tags_of = |digest: &Digest| -> Result<Vec<TagName>> {
            let ours = self.tags()?.into_iter().filter(|t| t.digest == *digest);
            ours.map(|entry| TagName::new(&entry.name, &entry.tag)).collect()
        };
        let (digest, tags) = match what {
            What::Untagged(digest) => {
                self.expect_tags_readable()?;
                if !self.find(digest)? || !tags_of(digest)?.is_empty() {
                    return Ok(Removal::Done(Removed::default()));
                }
                (*digest, Vec::new())
            }
            What::Named(TemplateRef::Tag(tag)) => {
                let digest = match self.tag(tag) {
                    Ok(Some(digest)) if self.has(&digest) => digest,
                    Ok(None) => {
                        // It says that there is none.
                        self.resolve(&TemplateRef::Tag(tag.clone()))?
                    }
                    // It points nowhere, or is damaged: there is nothing but itself to remove.
                    Ok(Some(_)) => return self.remove_tag_only(tag),
                    Err(e) if e.code() == Code::Damage => return self.remove_tag_only(tag),
                    Err(e) => return Err(e),
                };
                let tags = tags_of(&digest)?;
                if tags.iter().any(|t| t != tag) {
                    return self.remove_tag_only(tag);
                }
                (digest, tags)
            }
            What::Named(other) => {
                let digest = self.resolve(other)?;
                (digest, tags_of(&digest)?)
            }
        };
        if unused != Some(&digest) || !last_look()? {
            return Ok(Removal::Template(digest));
        }
        let session = Session::begin(&self.tmp_dir())?;
        // Tags first: what is left after a crash in between is a template without a name, not a name
        // without a template.
        for tag in &tags {
            self.remove_tag_locked(tag)?;
        }
        let grave = session.path().join("image");
        let folder = self.image_dir(&digest);
        fs::rename(&folder, &grave).map_err(|e| Error::io("cannot remove the template", &folder, e))?;
        sync_folder(&self.images_dir())?;
        Ok(Removal::Done(Removed { tags, template: Some(digest) }))
    }

    fn remove_tag_only(&self, tag: &TagName) -> Result<Removal> {
        self.remove_tag_locked(tag)?;
        Ok(Removal::Done(Removed { tags: vec![tag.clone()], template: None }))
    }
}
