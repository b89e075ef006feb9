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
    /// template is only named. While no name can change, `is_hidden` says whether it is still so that nobody can get it,
    /// and, when the store has it no more, `expect_unused` whether nobody has. Where that fails, all is put back.
    ///
    /// # Errors
    /// [`Code::NotFound`], what these two say, or when a file cannot be removed.
    pub fn remove(
        &self,
        what: What<'_>,
        unused: Option<&Digest>,
        is_hidden: impl Fn() -> Result<bool>,
        expect_unused: impl FnOnce() -> Result<()>,
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
            What::Named(reference) => {
                let Some(digest) = self.removable(reference)? else {
                    return self.remove_tag_only(reference);
                };
                let tags = tags_of(&digest)?;
                if let TemplateRef::Tag(tag) = reference
                    && tags.iter().any(|t| t != tag)
                {
                    return self.remove_tag_only(reference);
                }
                (digest, tags)
            }
        };
        if unused != Some(&digest) || !is_hidden()? {
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
        // In this order: nobody can have got it while it was sought.
        match expect_unused().and_then(|()| is_hidden()) {
            Ok(true) => Ok(Removal::Done(Removed { tags, template: Some(digest) })),
            otherwise => {
                // Whoever finds the folder finds all of it: it was never taken apart.
                fs::rename(&grave, &folder)
                    .map_err(|e| Error::io("cannot put back the template, which is in use", &folder, e))?;
                sync_folder(&self.images_dir())?;
                tags.iter().try_for_each(|tag| self.set_tag_locked(tag, &digest))?;
                otherwise.map(|_| Removal::Template(digest))
            }
        }
    }

    /// Fails where there is nothing that these words mean.
    ///
    /// # Errors
    /// As [`Store::resolve`]; a tag that points nowhere, or is damaged, can be removed.
    pub fn expect_removable(&self, reference: &TemplateRef) -> Result<()> {
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

    fn remove_tag_only(&self, reference: &TemplateRef) -> Result<Removal> {
        let TemplateRef::Tag(tag) = reference else { return Ok(Removal::Done(Removed::default())) };
        self.remove_tag_locked(tag)?;
        Ok(Removal::Done(Removed { tags: vec![tag.clone()], template: None }))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::progress::Silent;
    use crate::store::{FileKind, ImportFile, ImportRequest, Source};

    #[test]
    fn what_turns_out_to_be_in_use_is_put_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        let source = dir.path().join("source");
        fs::write(&source, vec![7; 204_800]).unwrap();
        let tags: [TagName; 2] = ["web:1".parse().unwrap(), "web:2".parse().unwrap()];
        let source = Source::Path(source);
        let file = ImportFile { name: "memory".into(), kind: FileKind::Ram, source };
        let request = ImportRequest::new(Some(tags[0].clone()), vec![file]);
        let digest = store.import(request, &Silent).unwrap().digest;
        store.set_tag(&tags[1], &digest).unwrap();
        let reference = TemplateRef::Digest(digest);
        let what = What::Named(&reference);
        let is_back = || {
            assert_eq!(store.template(&digest).unwrap().files().len(), 1);
            tags.iter().for_each(|tag| assert_eq!(store.tag(tag).unwrap(), Some(digest)));
        };
        let used = store.remove(
            what,
            Some(&digest),
            || Ok(true),
            || {
                assert!(!store.has(&digest) && store.tags().unwrap().is_empty());
                Err(Error::in_use("somebody has it"))
            },
        );
        assert_eq!(used.unwrap_err().code(), Code::InUse);
        is_back();
        // A mount that began in between: it is asked too, from the beginning.
        let looks = Cell::new(0);
        let first = || Ok(looks.replace(looks.get() + 1) == 0);
        assert_eq!(store.remove(what, Some(&digest), first, || Ok(())).unwrap(), Removal::Template(digest));
        assert_eq!(looks.get(), 2);
        is_back();
        let Removal::Done(removed) = store.remove(what, Some(&digest), || Ok(true), || Ok(())).unwrap()
        else {
            panic!("it stays");
        };
        assert_eq!((removed.tags, removed.template), (tags.to_vec(), Some(digest)));
        assert!(!store.has(&digest) && store.tags().unwrap().is_empty());
    }
}
