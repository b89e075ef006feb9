//! Tags: `tags/<name>/<tag>`, a small file with a digest, replaced as a whole.

use std::io;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::format::Invalid;
use super::open::no_template;
use super::path::StorePath;
use super::publish::{make_folder, replace_file, sync_folder};
use super::{Digest, Store, TagName, TemplateRef};
use crate::error::{Code, Error, Result};
use crate::units::Bytes;

/// Longest file that is read as a tag.
const MAX_TAG: Bytes = Bytes::new(4096);

/// One `NAME:TAG` and where it points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TagEntry {
    /// The name.
    pub name: String,
    /// The tag.
    pub tag: String,
    /// The template.
    pub digest: Digest,
    /// When it was last pointed there.
    #[serde(skip)]
    pub modified: SystemTime,
}

impl Store {
    pub(super) fn tag_path(&self, tag: &TagName) -> StorePath {
        self.tags_dir().join(tag.name()).join(tag.tag())
    }

    /// Where a tag points, or nothing.
    ///
    /// # Errors
    /// When it cannot be read or is no tag.
    pub fn tag(&self, tag: &TagName) -> Result<Option<Digest>> {
        self.tag_at(tag, &self.tag_path(tag))
    }

    fn tag_at(&self, tag: &TagName, path: &StorePath) -> Result<Option<Digest>> {
        match path.read(MAX_TAG) {
            Ok(bytes) => decode(&bytes).map(Some).map_err(|e| {
                e.in_file("tag", path).remedy(format!("point it anew: stencil tag DIGEST {tag}"))
            }),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                self.check_reachable().map(|()| None)
            }
            Err(e) => Err(self.blame(path.error("cannot read tag", e))),
        }
    }

    /// All tags, sorted by name and tag. A damaged one is left out with a warning in the log.
    ///
    /// # Errors
    /// When the folder of tags cannot be read.
    pub fn tags(&self) -> Result<Vec<TagEntry>> {
        let (files, unlisted) = self.tag_files()?;
        for error in unlisted {
            match error.code() {
                Code::TryAgain => return Err(error),
                _ => log::warn!("{error}"),
            }
        }
        let mut entries = Vec::new();
        for (pointer, path) in files {
            match self.tag_at(&pointer, &path) {
                Ok(Some(digest)) => {
                    let since = path.metadata().map_or(Duration::ZERO, |found| {
                        Duration::new(found.st_mtime.max(0) as u64, found.st_mtime_nsec as u32)
                    });
                    let modified = SystemTime::UNIX_EPOCH + since;
                    let (name, tag) = (pointer.name().to_owned(), pointer.tag().to_owned());
                    entries.push(TagEntry { name, tag, digest, modified });
                }
                Ok(None) => {}
                Err(e) if e.code() == Code::TryAgain => return Err(e),
                Err(e) => log::warn!("{e}"),
            }
        }
        Ok(entries)
    }

    /// Fails where it cannot be known what a tag points to, or where it points to nothing: which template has no other tag
    /// cannot be told then.
    ///
    /// # Errors
    /// [`Code::Damage`] that names the tag and its repair.
    pub fn expect_tags_readable(&self) -> Result<()> {
        let (files, unlisted) = self.tag_files()?;
        unlisted.into_iter().next().map_or(Ok(()), Err)?;
        // One flipped bit makes a tag name another digest.
        files.iter().try_for_each(|(tag, _)| self.target(tag).map(drop))
    }

    /// The template that a tag points to; `None` where there is no such tag.
    ///
    /// # Errors
    /// [`Code::Damage`] where it cannot be known, or where the tag points to a template that the store does not have.
    pub(super) fn target(&self, tag: &TagName) -> Result<Option<Digest>> {
        let Some(mut digest) = self.tag(tag)? else { return Ok(None) };
        while !self.has(&digest) {
            // A removal takes the tags first, and restores them last: a tag that is still there is not one of its.
            match self.tag(tag)? {
                Some(now) if now == digest && !self.has(&digest) => return Err(self.dangling(tag, &digest)),
                Some(now) => digest = now,
                None => return Ok(None),
            }
        }
        Ok(Some(digest))
    }
    fn dangling(&self, tag: &TagName, digest: &Digest) -> Error {
        Error::damage(format!("tag {tag} points to template {digest}, which is not there"))
            .at(self.tag_path(tag))
            .remedy(format!("import it again, or remove the tag: stencil rm {tag}"))
    }

    /// All tags with their files, sorted, whatever the files hold; and why the tags of a name cannot be listed.
    pub(super) fn tag_files(&self) -> Result<TagFiles> {
        let (mut found, mut unlisted) = (Vec::new(), Vec::new());
        let root = self.tags_dir();
        // Opened once; where that fails, the listing says why.
        let root = root.opened().unwrap_or(root);
        for name in self.names(&root)? {
            let folder = root.join(&name);
            let tags = self.names(&folder).unwrap_or_else(|e| {
                unlisted.push(e);
                Vec::new()
            });
            for tag in tags {
                if let Ok(pointer) = TagName::new(&name, &tag) {
                    let path = folder.join(&tag);
                    found.push((pointer, path));
                }
            }
        }
        Ok((found, unlisted))
    }

    /// Names that some tag has, sorted. No tag is read.
    ///
    /// # Errors
    /// When the folder of tags cannot be read.
    pub fn tag_names(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for name in self.names(&self.tags_dir())? {
            match self.has_name(&name) {
                Ok(true) => found.push(name),
                Ok(false) => {}
                Err(e) if e.code() == Code::TryAgain => return Err(e),
                Err(e) => log::warn!("{e}"),
            }
        }
        Ok(found)
    }

    /// The tags of one name, sorted. None of them is read.
    ///
    /// # Errors
    /// When the folder of its tags cannot be read.
    pub fn tags_named(&self, name: &str) -> Result<Vec<TagName>> {
        super::check_name("name", name)?;
        let tags = self.names(&self.tags_dir().join(name))?;
        Ok(tags.iter().filter_map(|tag| TagName::new(name, tag).ok()).collect())
    }

    /// True when some tag has that name.
    ///
    /// # Errors
    /// When the folder of its tags cannot be read.
    pub fn has_name(&self, name: &str) -> Result<bool> {
        if super::check_name("name", name).is_err() {
            return Ok(false);
        }
        let folder = self.tags_dir().join(name);
        match folder.has_name(|tag| !tag.as_encoded_bytes().starts_with(b".")) {
            Ok(found) => Ok(found),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.check_reachable().map(|()| false),
            Err(e) => Err(self.blame(folder.error("cannot list", e))),
        }
    }

    /// Names in a folder, sorted, without those that begin with a dot; a folder that just vanished has none.
    pub(super) fn names(&self, folder: &StorePath) -> Result<Vec<String>> {
        let entries = match folder.names() {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return self.check_reachable().map(|()| Vec::new());
            }
            Err(e) => return Err(self.blame(folder.error("cannot list", e))),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.to_string_lossy().into_owned();
            if !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Points `tag` at a template of this store.
    ///
    /// # Errors
    /// [`Code::NotFound`] when there is no such template.
    pub fn set_tag(&self, tag: &TagName, digest: &Digest) -> Result<()> {
        let _names = self.lock_names()?;
        self.set_tag_locked(tag, digest)
    }

    /// As [`Store::set_tag`]; the caller holds the lock of names.
    pub(super) fn set_tag_locked(&self, tag: &TagName, digest: &Digest) -> Result<()> {
        if !self.has(digest) {
            return Err(no_template(self.dir(), digest));
        }
        let path = self.tag_path(tag);
        let folder = self.tags_dir().join(tag.name());
        if !folder.is_dir() {
            make_folder(&folder)?;
        }
        replace_file(&self.tmp_dir(), &path, format!("blake3:{digest}\n").as_bytes())?;
        sync_folder(&self.tags_dir())
    }

    /// Takes a tag away; the template stays. The caller holds the lock of names.
    pub(super) fn remove_tag_locked(&self, tag: &TagName) -> Result<()> {
        let path = self.tag_path(tag);
        let folder = self.tags_dir().join(tag.name());
        path.remove_file().map_err(|e| path.error("cannot remove tag", e))?;
        sync_folder(&folder)?;
        // Fails while other tags of the name are there, and that is right.
        let _ = folder.remove_folder();
        sync_folder(&self.tags_dir())
    }

    /// The digest that a user's words mean.
    ///
    /// # Errors
    /// [`Code::NotFound`], a usage error when a prefix fits several templates, or [`Code::Damage`]
    /// when a tag points nowhere.
    pub fn resolve(&self, reference: &TemplateRef) -> Result<Digest> {
        let missing = || {
            Error::not_found(format!("no template '{reference}'"))
                .at(self.dir())
                .remedy("see stencil ls for what the store has")
        };
        match reference {
            TemplateRef::Digest(digest) if self.has(digest) => Ok(*digest),
            TemplateRef::Digest(_) => Err(missing()),
            TemplateRef::Tag(tag) => self.target(tag)?.ok_or_else(missing),
            TemplateRef::Prefix(prefix) => {
                let mut fits: Vec<Digest> = self.digests()?;
                fits.retain(|d| d.to_string().starts_with(prefix));
                match fits[..] {
                    [] => Err(missing()),
                    [one] => Ok(one),
                    [a, b, ..] => Err(Error::usage(format!("'{prefix}' is ambiguous: {a}, {b}"))
                        .remedy("write more digits of the digest")),
                }
            }
        }
    }
}

/// Tags with their files, and why those of a name cannot be listed.
pub(super) type TagFiles = (Vec<(TagName, StorePath)>, Vec<Error>);

/// Where the tag in that file points; nothing where it is damaged.
pub(super) fn read_tag(path: &StorePath) -> io::Result<Option<Digest>> {
    path.read(MAX_TAG).map(|bytes| decode(&bytes).ok())
}

fn decode(bytes: &[u8]) -> std::result::Result<Digest, Invalid> {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.strip_prefix("blake3:")?.strip_suffix('\n')?.parse().ok())
        .ok_or_else(|| Invalid::damage("it holds no digest"))
}
