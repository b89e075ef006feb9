//! Notes about options without effect and expensive combinations of options.

use super::note::Note;
use super::options::{FileOptions, Options};
use super::row::Role;

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
            .hint("use prefault=on, which fills the page tables without copying"),
        );
    }
    if role == Role::Template && options.reserve && !options.prealloc {
        notes.push(
            Note::new("charged-in-full", "the whole size of each clone is charged to Committed_AS")
                .bytes(size)
                .hint("use reserve=off, which QEMU accepts unless vm.overcommit_memory is 2"),
        );
    }
    let Some(file) = file else { return notes };
    if file.discard_data && file.readonly {
        notes.push(
            Note::new(
                "discard-without-effect",
                "discard-data=on has no effect: the file is opened read-only",
            )
            .hint("remove discard-data"),
        );
    }
    if file.discard_data && !file.readonly && !options.share {
        notes.push(
            Note::new("discard-without-effect", "discard-data=on has no effect on a private mapping")
                .hint("use share=on, or remove discard-data"),
        );
    }
    if file.pmem && !options.share {
        notes.push(
            Note::new("pmem-without-effect", "pmem=on has no effect: MAP_SYNC requires share=on")
                .hint("use share=on, or remove pmem"),
        );
    }
    notes
}
