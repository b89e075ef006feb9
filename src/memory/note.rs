//! Notes for the user about a working backend.

use std::path::Path;

use serde::Serialize;

use crate::units::Bytes;

use super::options::{FileOptions, Options};
use super::row::Role;

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
    /// What to do, as an imperative.
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

    fn remedy(mut self, remedy: impl Into<String>) -> Note {
        self.remedy = Some(remedy.into());
        self
    }

    pub(super) fn short_form(written: &str, key: &str, value: &str) -> Note {
        Note::new("short-form", format!("short-form boolean option '{written}' deprecated"))
            .remedy(format!("Please use {key}={value} instead"))
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

/// Returns the notes that follow from the options alone.
pub(super) fn notes_of(options: &Options, file: Option<&FileOptions>, role: Role) -> Vec<Note> {
    let mut notes = Vec::new();
    let size = options.size;
    if role == Role::Template && options.prealloc {
        notes.push(
            Note::new(
                "prealloc-copies",
                "prealloc=on copies every page, so no page of the template is shared",
            )
            .bytes(size)
            .remedy("use prefault=on, which fills the page tables without copying"),
        );
    }
    if role == Role::Template && options.reserve && !options.prealloc {
        notes.push(
            Note::new("charged-in-full", "the whole size of each clone is charged to Committed_AS")
                .bytes(size)
                .remedy("use reserve=off"),
        );
    }
    let Some(file) = file else { return notes };
    if file.discard_data && file.readonly {
        notes.push(
            Note::new(
                "discard-without-effect",
                "discard-data=on has no effect: the file is opened read-only",
            )
            .remedy("remove discard-data"),
        );
    }
    if file.discard_data && !file.readonly && !options.share {
        notes.push(
            Note::new("discard-without-effect", "discard-data=on has no effect on a private mapping")
                .remedy("use share=on, or remove discard-data"),
        );
    }
    if file.pmem && !options.share {
        notes.push(
            Note::new("pmem-without-effect", "pmem=on has no effect: MAP_SYNC requires share=on")
                .remedy("use share=on, or remove pmem"),
        );
    }
    notes
}
