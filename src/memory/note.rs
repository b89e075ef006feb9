//! Notes for the user about a working backend.

use std::path::Path;

use serde::Serialize;

use crate::units::Bytes;

/// A note about a working backend: an option without effect, or an expensive combination of options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// A stable identifier for programs.
    pub name: &'static str,
    /// Text for the user.
    pub message: String,
    /// Size of the affected memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bytes>,
    /// The remedy, as an imperative.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Note {
    pub(super) fn new(name: &'static str, message: impl Into<String>) -> Note {
        Note { name, message: message.into(), bytes: None, remedy: None }
    }

    pub(super) fn bytes(mut self, bytes: Bytes) -> Note {
        self.bytes = Some(bytes);
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Note {
        self.remedy = Some(hint.into());
        self
    }

    pub(super) fn short_form(written: &str, key: &str, value: &str) -> Note {
        Note::new("short-form", format!("short-form boolean option '{written}' deprecated"))
            .hint(format!("Please use {key}={value} instead"))
    }

    pub(super) fn no_sync(path: &Path) -> Note {
        Note::new(
            "no-sync",
            format!(
                "requesting persistence across crashes for backend file {} failed. Proceeding without \
                 persistence, data might become corrupted in case of host crash.",
                path.display()
            ),
        )
    }

    pub(super) fn no_huge_advice() -> Note {
        Note::new(
            "no-huge-advice",
            "MADV_HUGEPAGE is not set on a FUSE file: the kernel would read 2 MiB for each page fault of 4 KiB",
        )
    }
}
