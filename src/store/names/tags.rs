//! Tags: files `tags/<name>/<tag>` that hold a digest and are replaced atomically.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::error::{Code, Error, Result};
use crate::store::disk::open::no_template;
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::{make_directory, sync_directory};
use crate::store::disk::session::replace_file;
use crate::store::format::Invalid;
use crate::store::{Digest, Store, TagName, TemplateRef};
use crate::units::Bytes;

/// Maximum length of a tag file that is read.
const MAX_TAG: Bytes = Bytes::new(4096);

/// Maximum number of existing tags that the hint for an unknown tag names.
const MAX_NAMED: usize = 8;

/// A tag `NAME:TAG` and its template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagEntry {
    /// Part before the colon.
    pub name: String,
    /// Part after the colon.
    pub tag: String,
    /// Template that the tag points at.
    pub digest: Digest,
    /// Time of the last change.
    pub modified: SystemTime,
}

/// A tag that was moved to another template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// The tag.
    pub tag: TagName,
    /// Template that the tag pointed at before.
    pub former_digest: Digest,
    /// True if no tag points at that template now, so that `gc --untagged` removes the template.
    pub former_untagged: bool,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} moved from {}", self.tag, self.former_digest.short())?;
        if self.former_untagged { f.write_str(", which has no tag now") } else { Ok(()) }
    }
}

impl Store {
    pub(in crate::store) fn tag_path(&self, tag: &TagName) -> StorePath {
        self.tags_dir().join(tag.name()).join(tag.tag())
    }

    /// Returns the digest that a tag points at, or `None` if the tag does not exist.
    ///
    /// # Errors
    /// Returns an error if the tag cannot be read or is damaged.
    pub fn tag(&self, tag: &TagName) -> Result<Option<Digest>> {
        self.tag_at(tag, &self.tag_path(tag))
    }

    fn tag_at(&self, tag: &TagName, path: &StorePath) -> Result<Option<Digest>> {
        match path.read(MAX_TAG) {
            Ok(bytes) => decode(&bytes).map(Some).map_err(|e| {
                e.in_file("tag", path).hint(format!("run 'stencil tag DIGEST {tag}' to set the tag again"))
            }),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                self.check_reachable().map(|()| None)
            }
            Err(e) => Err(self.outage_or(path.error("cannot read tag", e))),
        }
    }

    /// Returns all tags, sorted by name and tag. A damaged tag is skipped with a warning in the log.
    ///
    /// # Errors
    /// Returns an error if the directory `tags` cannot be read.
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
                        Duration::from_secs(u64::try_from(found.st_mtime).unwrap_or(0))
                            + Duration::from_nanos(found.st_mtime_nsec)
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

    /// Fails if a tag is unreadable or dangling. The set of templates without another tag cannot be determined then.
    ///
    /// # Errors
    /// Returns [`Code::Damage`] with the tag and its repair.
    pub fn expect_tags_readable(&self) -> Result<()> {
        let (files, unlisted) = self.tag_files()?;
        unlisted.into_iter().next().map_or(Ok(()), Err)?;
        // A single flipped bit makes a tag point at another digest.
        files.iter().try_for_each(|(tag, _)| self.target(tag).map(drop))
    }

    /// Returns the template that a tag points at, or `None` if the tag does not exist.
    ///
    /// # Errors
    /// Returns [`Code::Damage`] if the tag cannot be read, or if the store does not have its template.
    pub(in crate::store) fn target(&self, tag: &TagName) -> Result<Option<Digest>> {
        let Some(mut digest) = self.tag(tag)? else { return Ok(None) };
        while !self.has(&digest) {
            // A removal sets the tags aside first and restores them last, so a tag that is present while its template
            // is missing is not part of a removal.
            match self.tag(tag)? {
                Some(now) if now == digest && !self.has(&digest) => {
                    return Err(self.dangling_error(tag, &digest));
                }
                Some(now) => digest = now,
                None => return Ok(None),
            }
        }
        Ok(Some(digest))
    }

    fn dangling_error(&self, tag: &TagName, digest: &Digest) -> Error {
        Error::damage(format!("tag {tag} points at template {digest}, which does not exist"))
            .at(self.tag_path(tag))
            .hint(format!("import the same memory again, or run 'stencil rm {tag}' to remove the tag"))
    }

    /// Returns all tags with their files, sorted, without reading the files; and the errors of names whose tags cannot
    /// be listed.
    pub(in crate::store) fn tag_files(&self) -> Result<TagFiles> {
        let (mut found, mut unlisted) = (Vec::new(), Vec::new());
        let root = self.tags_dir();
        // The root is opened once for all tags. If that fails, the listing below returns the error.
        let root = root.opened().unwrap_or(root);
        for name in self.names(&root)? {
            let directory = root.join(&name);
            let tags = self.names(&directory).unwrap_or_else(|e| {
                unlisted.push(e);
                Vec::new()
            });
            for tag in tags {
                if let Ok(pointer) = TagName::new(&name, &tag) {
                    let path = directory.join(&tag);
                    found.push((pointer, path));
                }
            }
        }
        Ok((found, unlisted))
    }

    /// Returns the names that have a tag, sorted. No tag is read.
    ///
    /// # Errors
    /// Returns an error if the directory `tags` cannot be read.
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

    /// Returns the tags of one name, sorted. No tag is read.
    ///
    /// # Errors
    /// Returns an error if the directory of the tags cannot be read.
    pub fn tags_named(&self, name: &str) -> Result<Vec<TagName>> {
        crate::store::check_name("name", name)?;
        let tags = self.names(&self.tags_dir().join(name))?;
        Ok(tags.iter().filter_map(|tag| TagName::new(name, tag).ok()).collect())
    }

    /// Returns true if a tag has this name.
    ///
    /// # Errors
    /// Returns an error if the directory of the tags cannot be read.
    pub fn has_name(&self, name: &str) -> Result<bool> {
        if crate::store::check_name("name", name).is_err() {
            return Ok(false);
        }
        let directory = self.tags_dir().join(name);
        match directory.has_name(|tag| !tag.as_encoded_bytes().starts_with(b".")) {
            Ok(found) => Ok(found),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.check_reachable().map(|()| false),
            Err(e) => Err(self.outage_or(directory.error("cannot list", e))),
        }
    }

    /// Returns the names in a directory, sorted, without names that start with a dot. A directory that was just removed
    /// has none.
    pub(in crate::store) fn names(&self, directory: &StorePath) -> Result<Vec<String>> {
        let entries = match directory.names() {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return self.check_reachable().map(|()| Vec::new());
            }
            Err(e) => return Err(self.outage_or(directory.error("cannot list", e))),
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

    /// Points `tag` at a template of this store. Returns the move if the tag pointed at another template.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`] if the template does not exist.
    pub fn set_tag(&self, tag: &TagName, digest: &Digest) -> Result<Option<Moved>> {
        let _names = self.lock_names()?;
        let former = self.set_tag_locked(tag, digest)?;
        Ok(self.moved(former.map(|former| (tag.clone(), former)).into_iter().collect()).pop())
    }

    /// Describes tags that pointed at these templates before. The caller holds the names lock.
    pub(in crate::store) fn moved(&self, former: Vec<(TagName, Digest)>) -> Vec<Moved> {
        // A tag that cannot be read may point at any template.
        let targets = || -> Result<HashSet<Option<Digest>>> {
            let (files, unlisted) = self.tag_files()?;
            unlisted.into_iter().next().map_or(Ok(()), Err)?;
            files.iter().map(|(tag, path)| self.tag_at(tag, path)).collect()
        };
        let targets = if former.is_empty() { None } else { targets().ok() };
        let is_untagged = |digest| targets.as_ref().is_some_and(|targets| !targets.contains(&Some(digest)));
        former
            .into_iter()
            .map(|(tag, digest)| Moved { tag, former_digest: digest, former_untagged: is_untagged(digest) })
            .collect()
    }

    /// Same as [`Store::set_tag`], but returns the template that the tag pointed at. The caller holds the names lock.
    pub(in crate::store) fn set_tag_locked(&self, tag: &TagName, digest: &Digest) -> Result<Option<Digest>> {
        if !self.has(digest) {
            return Err(no_template(self.dir(), digest));
        }
        let former = self.tag(tag).ok().flatten().filter(|former| former != digest);
        let path = self.tag_path(tag);
        let directory = self.tags_dir().join(tag.name());
        if !directory.is_dir() {
            make_directory(&directory)?;
        }
        replace_file(&self.tmp_dir(), &path, format!("blake3:{digest}\n").as_bytes())?;
        sync_directory(&self.tags_dir())?;
        Ok(former)
    }

    /// Removes a tag, but not its template. The caller holds the names lock.
    pub(in crate::store) fn remove_tag_locked(&self, tag: &TagName) -> Result<()> {
        let path = self.tag_path(tag);
        let directory = self.tags_dir().join(tag.name());
        path.remove_file().map_err(|e| path.error("cannot remove tag", e))?;
        sync_directory(&directory)?;
        // Fails, as intended, if the name has other tags.
        let _ = directory.remove_folder();
        sync_directory(&self.tags_dir())
    }

    /// Returns the hint for a tag that does not exist: the tags with the same name. `None` if there are none.
    fn existing_tags(&self, name: &str) -> Option<String> {
        let tags = self.tags_named(name).ok().filter(|tags| !tags.is_empty())?;
        let named: Vec<String> = tags.iter().take(MAX_NAMED).map(TagName::to_string).collect();
        let more = match tags.len() - named.len() {
            0 => String::new(),
            _ => format!(", …; run 'stencil ls {name}' to list all {}", tags.len()),
        };
        Some(format!("use an existing tag: {}{more}", named.join(", ")))
    }

    /// Returns the digest of a reference.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`] if the template does not exist, a usage error if a prefix matches several templates,
    /// or [`Code::Damage`] if a tag is dangling or damaged.
    pub fn resolve(&self, reference: &TemplateRef) -> Result<Digest> {
        let missing = || {
            let remedy = match reference {
                TemplateRef::Tag(tag) => self.existing_tags(tag.name()),
                _ => None,
            };
            Error::not_found(format!("no template '{reference}'"))
                .at(self.dir())
                .hint(remedy.unwrap_or_else(|| "run 'stencil ls' to list the templates".to_owned()))
        };
        match reference {
            TemplateRef::Digest(digest) if self.has(digest) => Ok(*digest),
            TemplateRef::Digest(_) => Err(missing()),
            TemplateRef::Tag(tag) => self.target(tag)?.ok_or_else(missing),
            TemplateRef::Prefix(prefix) => {
                let mut matching: Vec<Digest> = self.digests()?;
                matching.retain(|d| d.to_string().starts_with(prefix));
                match matching[..] {
                    [] => Err(missing()),
                    [one] => Ok(one),
                    [a, b, ..] => {
                        Err(Error::usage(format!("ambiguous digest prefix '{prefix}': matches {a} and {b}"))
                            .hint("write more digits of the digest"))
                    }
                }
            }
        }
    }
}

/// Tags with their files, and the errors of names whose tags cannot be listed.
pub(in crate::store) type TagFiles = (Vec<(TagName, StorePath)>, Vec<Error>);

/// Returns the digest in a tag file, or `None` if the file is damaged.
pub(in crate::store) fn read_tag(path: &StorePath) -> io::Result<Option<Digest>> {
    path.read(MAX_TAG).map(|bytes| decode(&bytes).ok())
}

fn decode(bytes: &[u8]) -> std::result::Result<Digest, Invalid> {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.strip_prefix("blake3:")?.strip_suffix('\n')?.parse().ok())
        .ok_or_else(|| Invalid::damage("the content is not a digest"))
}
