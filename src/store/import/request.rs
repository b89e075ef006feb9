//! What is to be imported, and what came of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;

use super::format::check_format;
use super::reader::Input;
use crate::error::{Error, Result};
use crate::store::image::MANIFEST;
use crate::store::{
    ChunkSize, Compression, Digest, FileKind, Owner, Policy, TagName, TemplateFile, check_name,
};
use crate::units::Bytes;

/// Where the bytes of a file come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, a block device or a pipe.
    Path(PathBuf),
    /// Standard input.
    Stdin,
    /// A regular file that is there only when everything else has been read.
    Later(Later),
}

/// A file of known size that is opened after all other sources have been read: what has to stand still for those
/// may go on then.
#[derive(Clone)]
pub struct Later {
    /// Its size in bytes.
    pub size: u64,
    /// Gives it, from its start.
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

/// One file of the new template.
#[derive(Debug, Clone)]
pub struct ImportFile {
    /// Its name in the template.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Its bytes.
    pub source: Source,
}

/// What the sources are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImportFormat {
    /// Looks at the sources.
    #[default]
    Auto,
    /// The bytes as they are.
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
            _ => Err(Error::usage(format!("'{text}' is no format")).remedy("use auto, raw or firecracker")),
        }
    }
}

/// A template that is to be made. What is `None` keeps the value of a template with the same content,
/// if there is one, or its default.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// The tag to point at it; without one it can be found by its digest only.
    pub tag: Option<TagName>,
    /// Its files, in any order.
    pub files: Vec<ImportFile>,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
    /// Permission bits of its files.
    pub mode: Option<u32>,
    /// User and group of its files.
    pub owner: Owner,
    /// What the sources are.
    pub format: ImportFormat,
    /// How to launch clones of it.
    pub recipe: Option<serde_json::Value>,
    /// How new blocks are compressed.
    pub compression: Compression,
    /// The separately decodable part of a block.
    pub chunk_size: ChunkSize,
    /// Becomes true when the import is to stop.
    pub interrupt: Option<Arc<AtomicBool>>,
    /// How long a pipe may be silent before the import fails; for ever without it, or where it is zero. Who imports
    /// holds a collector up, and that one other writers.
    pub stall: Option<Duration>,
}

impl ImportRequest {
    /// A request for these files with every default.
    pub fn new(tag: Option<TagName>, files: Vec<ImportFile>) -> ImportRequest {
        ImportRequest {
            tag,
            files,
            labels: BTreeMap::new(),
            mode: None,
            owner: Owner::default(),
            format: ImportFormat::default(),
            recipe: None,
            compression: Compression::default(),
            chunk_size: ChunkSize::default(),
            interrupt: None,
            stall: None,
        }
    }

    /// Opens the sources, sorted by name.
    pub(super) fn inputs(&self) -> Result<Vec<Input>> {
        self.check()?;
        let mut files: Vec<&ImportFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut inputs: Vec<Input> = files.into_iter().map(Input::open).collect::<Result<_>>()?;
        for input in &mut inputs {
            input.must_be_plain = input.kind == FileKind::Ram && self.format != ImportFormat::Raw;
        }
        check_format(self.format, &inputs)?;
        inputs.iter().filter_map(|i| i.size().map(|size| i.check_size(size))).collect::<Result<()>>()?;
        let mut total: u64 = 0;
        for input in &inputs {
            total = total.saturating_add(input.size().unwrap_or_default());
            input.check_total(total)?;
        }
        Ok(inputs)
    }

    /// What it says about the policy.
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

    /// Refuses what can be refused without reading a source.
    ///
    /// # Errors
    /// A usage error, or [`Code::NotFound`](crate::error::Code) when a source does not exist.
    pub fn check(&self) -> Result<()> {
        if self.files.is_empty() {
            return Err(Error::usage("nothing to import")
                .remedy("name a memory image, or files with --file NAME=PATH"));
        }
        if self.files.len() > crate::store::format::image::MAX_FILES {
            return Err(Error::usage(format!(
                "{} files; a template holds at most {}",
                self.files.len(),
                crate::store::format::image::MAX_FILES
            ))
            .remedy("leave some out, or make two templates"));
        }
        let mut files: Vec<&ImportFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        for file in &files {
            check_name("file name", &file.name)?;
            if file.name == MANIFEST {
                return Err(Error::usage(
                    "a file cannot be named manifest.json: the mount shows one of its own",
                )
                .remedy("give it another name: --file NAME=PATH"));
            }
        }
        if let Some(pair) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::usage(format!("file '{}' is given twice", pair[0].name))
                .remedy("give each file a name of its own: --file NAME=PATH"));
        }
        if files.iter().filter(|f| f.source == Source::Stdin).count() > 1 {
            return Err(
                Error::usage("standard input can be one file only").remedy("give the others as paths")
            );
        }
        for file in files {
            if let Source::Path(path) = &file.source {
                std::fs::metadata(path).map_err(|e| Error::io("cannot open", path, e))?;
            }
        }
        Ok(())
    }
}

/// A template that was imported.
#[derive(Debug, Clone, Serialize)]
pub struct Imported {
    /// Its identity.
    pub digest: Digest,
    /// The tag that points at it now.
    pub tag: Option<TagName>,
    /// Its files.
    pub files: Vec<TemplateFile>,
    /// True when the store had this content already.
    pub existed: bool,
    /// Bytes of blocks that are new in the store, before compression.
    pub new_bytes: Bytes,
    /// Bytes that were added to packs.
    pub stored_bytes: Bytes,
    /// Blocks that the store had, but damaged; they were stored anew.
    pub repaired_blocks: u64,
}
