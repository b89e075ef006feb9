//! Removal of tags and templates. Packs stay: blocks may be shared.

use std::fs;

use serde::Serialize;

use super::publish::{Session, sync_folder};
use super::{Digest, Store, TagName, TemplateRef};
use crate::error::{Code, Error, Result};

/// What a removal has taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Tags that are gone.
    pub tags: Vec<TagName>,
    /// The template, when it is gone too.
    pub template: Option<Digest>,
}

impl Store {
    /// Removes what `reference` names. A tag of a template that has others is removed alone; the last
    /// tag takes the template along, and a digest takes all its tags along.
    ///
    /// `in_use` is asked before a template goes, while no name can change; its error stops the removal.
    ///
    /// # Errors
    /// [`Code::NotFound`], what `in_use` says, or when a file cannot be removed.
    pub fn remove(
        &self,
        reference: &TemplateRef,
        in_use: impl FnOnce(&Digest) -> Result<()>,
    ) -> Result<Removed> {
        let _names = self.lock_names()?;
        let digest = match reference {
            TemplateRef::Tag(tag) => match self.tag(tag) {
                Ok(Some(digest)) if self.has(&digest) => digest,
                Ok(None) => return self.resolve(reference).map(|_| nothing()),
                // It points nowhere, or is damaged: there is nothing but itself to remove.
                Ok(Some(_)) => return self.remove_tag_only(tag),
                Err(e) if e.code() == Code::Damage => return self.remove_tag_only(tag),
                Err(e) => return Err(e),
            },
            other => self.resolve(other)?,
        };
        let mut tags: Vec<TagName> = Vec::new();
        for entry in self.tags()?.into_iter().filter(|t| t.digest == digest) {
            tags.push(TagName::new(&entry.name, &entry.tag)?);
        }
        if let TemplateRef::Tag(tag) = reference
            && tags.iter().any(|t| t != tag)
        {
            return self.remove_tag_only(tag);
        }
        in_use(&digest)?;
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
        Ok(Removed { tags, template: Some(digest) })
    }

    fn remove_tag_only(&self, tag: &TagName) -> Result<Removed> {
        self.remove_tag_locked(tag)?;
        Ok(Removed { tags: vec![tag.clone()], template: None })
    }
}

fn nothing() -> Removed {
    Removed { tags: Vec::new(), template: None }
}
