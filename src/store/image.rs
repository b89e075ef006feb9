//! The files of a template.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE};

/// The mount shows a file of this name of its own.
pub const MANIFEST: &str = "manifest.json";

/// What a file of a template is. The numbers are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum FileKind {
    /// Guest memory: whole 4 KiB pages.
    Ram = 0,
    /// Guest memory that nobody writes: whole 4 KiB pages.
    Rom = 1,
    /// Anything else, of any length: device state, a description.
    Blob = 2,
}

impl FileKind {
    /// The word used in JSON and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Ram => "ram",
            FileKind::Rom => "rom",
            FileKind::Blob => "blob",
        }
    }

    /// True when a file of this kind may have so many bytes: memory is whole pages, and at least one.
    pub(super) fn can_have(self, size: u64) -> bool {
        !self.is_memory() || (size != 0 && size.is_multiple_of(PAGE_SIZE))
    }

    /// True for what a guest sees as memory.
    pub fn is_memory(self) -> bool {
        self != FileKind::Blob
    }
}

impl FromStr for FileKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<FileKind> {
        match text {
            "ram" => Ok(FileKind::Ram),
            "rom" => Ok(FileKind::Rom),
            "blob" => Ok(FileKind::Blob),
            _ => Err(Error::usage(format!("'{text}' is no kind of file")).remedy("use ram, rom or blob")),
        }
    }
}

/// One named file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateFile {
    /// Its name in the template.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Its length.
    #[serde(rename = "size_bytes")]
    pub size: Bytes,
    /// How much of it lies in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
}
