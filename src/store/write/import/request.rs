//! An import request and its result.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::store::format::template_file::MANIFEST;
use crate::store::{Compression, Digest, FileKind, Moved, Owner, Policy, TagName, TemplateFile, check_name};
use crate::units::{Bytes, PageCount};

/// Source of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, block device or pipe.
    Path(PathBuf),
    /// Standard input.
    Stdin,
    /// A regular file that the caller has opened.
    Opened(Opened),
    /// A regular file that exists only after all other sources have been read.
    Later(Later),
}

/// An open regular file. The import reads it by offsets.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Path for messages.
    pub path: PathBuf,
    /// The file.
    pub file: Arc<File>,
}

impl PartialEq for Opened {
    fn eq(&self, other: &Opened) -> bool {
        Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Eq for Opened {}

/// A file of known size that is opened after all other sources have been read, so that the caller may resume a paused
/// guest before the file is read.
#[derive(Clone)]
pub struct Later {
    /// Size in bytes.
    pub size: u64,
    /// Opens the file, positioned at its start.
    pub open: Arc<dyn Fn() -> Result<File> + Send + Sync>,
}

impl fmt::Debug for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Later").field("size", &self.size).finish_non_exhaustive()
    }
}

impl PartialEq for Later {
    fn eq(&self, other: &Later) -> bool {
        Arc::ptr_eq(&self.open, &other.open)
    }
}

impl Eq for Later {}

/// The base of a diff snapshot: pages that are holes in the diff are those of its memory. The caller holds a lease on
/// it.
#[derive(Debug, Clone, Copy)]
pub struct Base {
    /// Digest of the template.
    pub digest: Digest,
    /// Accept a diff without any hole, in which every page has changed.
    pub all_pages: bool,
}

/// One file of the new template.
#[derive(Debug, Clone)]
pub struct ImportFile {
    /// Name of the file in the template.
    pub name: String,
    /// Kind of the file.
    pub kind: FileKind,
    /// Source of the file's bytes.
    pub source: Source,
}

/// Format of the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImportFormat {
    /// Detect the format from the sources.
    #[default]
    Auto,
    /// Plain bytes, unchecked.
    Raw,
    /// A Firecracker snapshot: a memory file and a state file.
    Firecracker,
}

impl FromStr for ImportFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<ImportFormat> {
        match text {
            "auto" => Ok(ImportFormat::Auto),
            "raw" => Ok(ImportFormat::Raw),
            "firecracker" => Ok(ImportFormat::Firecracker),
            _ => Err(Error::usage(format!("invalid format '{text}'")).hint("use auto, raw or firecracker")),
        }
    }
}

/// Request for a new template. A field that is `None` keeps the value of the store's template with the same content, if
/// any, or gets its default.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// Tag to point at the template. Without a tag, only its digest names the template.
    pub tag: Option<TagName>,
    /// Files, in any order.
    pub files: Vec<ImportFile>,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
    /// Permission bits of the files.
    pub mode: Option<u32>,
    /// User and group of the files.
    pub owner: Owner,
    /// Format of the sources.
    pub format: ImportFormat,
    /// The base, if the file of kind ram is a diff.
    pub base: Option<Base>,
    /// Recipe for launching clones.
    pub recipe: Option<serde_json::Value>,
    /// Compression of new blocks.
    pub compression: Compression,
    /// Set to true to interrupt the import.
    pub interrupt: Option<Arc<AtomicBool>>,
    /// Longest time that a pipe may send no bytes before the import fails; `None` or zero means no limit. A stalled
    /// import blocks a garbage collection, and a waiting collection blocks other writers.
    pub stall: Option<Duration>,
}

impl ImportRequest {
    /// Creates a request for these files with default values.
    pub fn new(tag: Option<TagName>, files: Vec<ImportFile>) -> ImportRequest {
        ImportRequest {
            tag,
            files,
            labels: BTreeMap::new(),
            mode: None,
            owner: Owner::default(),
            format: ImportFormat::default(),
            base: None,
            recipe: None,
            compression: Compression::default(),
            interrupt: None,
            stall: None,
        }
    }

    /// Applies the requested mode, owner, labels and recipe to `policy`.
    pub(super) fn apply(&self, policy: &mut Policy) {
        if let Some(mode) = self.mode {
            policy.mode = mode;
        }
        self.owner.apply(policy);
        policy.labels.extend(self.labels.clone());
        if self.recipe.is_some() {
            policy.recipe = self.recipe.clone();
        }
    }

    /// Checks the request as far as possible without reading a source.
    ///
    /// # Errors
    /// Returns a usage error if the request is invalid, or [`Code::NotFound`](crate::error::Code) if a source does not
    /// exist.
    pub fn check(&self) -> Result<()> {
        if self.files.is_empty() {
            return Err(Error::usage("nothing to import")
                .hint("name a memory image, or files with '--file NAME=PATH'"));
        }
        if self.files.len() > crate::store::format::image::MAX_FILES {
            return Err(Error::usage(format!(
                "too many files: {}, the limit of a template is {}",
                self.files.len(),
                crate::store::format::image::MAX_FILES
            ))
            .hint("leave out some files, or import two templates"));
        }
        let mut files: Vec<&ImportFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        for file in &files {
            check_name("file name", &file.name)?;
            if file.name == MANIFEST {
                return Err(Error::usage(
                    "invalid file name 'manifest.json': the mount generates a file of this name",
                )
                .hint("choose another name with '--file NAME=PATH'"));
            }
        }
        if let Some(pair) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::usage(format!("file name '{}' is given twice", pair[0].name))
                .hint("choose a different name for each file with '--file NAME=PATH'"));
        }
        if files.iter().filter(|f| f.source == Source::Stdin).count() > 1 {
            return Err(Error::usage("standard input is given for more than one file")
                .hint("name the other files by their paths"));
        }
        for file in files {
            if let Source::Path(path) = &file.source {
                std::fs::metadata(path).map_err(|e| Error::io("cannot open", path, e))?;
            }
        }
        Ok(())
    }
}

/// Result of an import.
#[derive(Debug, Clone, Serialize)]
pub struct Imported {
    /// Digest of the template.
    pub digest: Digest,
    /// Tag that points at the template now.
    pub tag: Option<TagName>,
    /// Files of the template.
    pub files: Vec<TemplateFile>,
    /// True if the store already had this content.
    pub existed: bool,
    /// The tag, if it pointed at another template before.
    pub moved: Vec<Moved>,
    /// Bytes of blocks that were new in the store, before compression.
    pub new_bytes: Bytes,
    /// Bytes that were added to packs.
    pub stored_bytes: Bytes,
    /// Number of damaged blocks that were stored again.
    pub repaired_blocks: u64,
    /// Number of pages of a diff that are not the base's.
    #[serde(skip)]
    pub changed_pages: Option<PageCount>,
    /// Warnings about the sources. The JSON of each command has them beside this object.
    #[serde(skip)]
    pub warnings: Vec<String>,
}
