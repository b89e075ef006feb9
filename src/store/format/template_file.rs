//! The files of a template.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE};

/// Name of the file that the mount generates in each template directory.
pub const MANIFEST: &str = "manifest.json";

/// Kind of a file of a template. The numbers are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum FileKind {
    /// Guest memory: whole 4 KiB pages.
    Ram = 0,
    /// Guest memory that the guest cannot write: whole 4 KiB pages.
    Rom = 1,
    /// Any other content, of any length: device state, a description.
    Blob = 2,
}

impl FileKind {
    /// Returns the name used in JSON and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Ram => "ram",
            FileKind::Rom => "rom",
            FileKind::Blob => "blob",
        }
    }

    /// Returns true if a file of this kind may have this size in bytes: memory consists of whole pages, at least one.
    pub(in crate::store) fn can_have(self, size: u64) -> bool {
        !self.is_memory() || (size != 0 && size.is_multiple_of(PAGE_SIZE))
    }

    /// Returns true if the guest sees the file as memory.
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
            _ => Err(Error::usage(format!("invalid file kind '{text}'")).hint("use ram, rom or blob")),
        }
    }
}

/// One file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateFile {
    /// Name of the file.
    pub name: String,
    /// Kind of the file.
    pub kind: FileKind,
    /// Size in bytes.
    #[serde(rename = "size_bytes")]
    pub size: Bytes,
    /// Bytes in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
}
