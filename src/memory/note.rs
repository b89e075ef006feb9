//! What the user should know about a backend that works.

use std::path::Path;

use serde::Serialize;

use crate::units::Bytes;

use super::options::{FileOptions, Options};
use super::row::Role;

/// Something that the user should know about a backend that works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// A stable word for programs.
    pub name: &'static str,
    /// What is so.
    pub message: String,
    /// How much memory it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bytes>,
    /// What to do about it.
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
            "the file lies on FUSE: MADV_HUGEPAGE is not given, there it would fetch 2 MiB for every 4 KiB",
        )
    }
}

/// What the options alone give reason to say.
pub(super) fn notes_of(options: &Options, file: Option<&FileOptions>, role: Role) -> Vec<Note> {
    let mut notes = Vec::new();
    let size = options.size;
    if role == Role::Template && options.prealloc {
        notes.push(
            Note::new("prealloc-copies", "prealloc=on copies every page: nothing of the template is shared")
                .bytes(size)
                .remedy("use prefault=on, which fills the page tables and copies nothing"),
        );
    }
    if role == Role::Template && options.reserve && !options.prealloc {
        notes.push(
            Note::new("charged-in-full", "every clone is charged its whole size in Committed_AS")
                .bytes(size)
                .remedy("use reserve=off"),
        );
    }
    let Some(file) = file else { return notes };
    if file.discard_data && file.readonly {
        notes.push(
            Note::new("discard-without-effect", "discard-data=on does nothing: the file is opened read-only")
                .remedy("leave discard-data out"),
        );
    }
    if file.discard_data && !file.readonly && !options.share {
        notes.push(
            Note::new("discard-without-effect", "discard-data=on does nothing on a private mapping")
                .remedy("use share=on, or leave discard-data out"),
        );
    }
    if file.pmem && !options.share {
        notes.push(
            Note::new("pmem-without-effect", "pmem=on asks for MAP_SYNC, which only share=on can have")
                .remedy("use share=on, or leave pmem out"),
        );
    }
    notes
}
