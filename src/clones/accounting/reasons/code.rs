//! The table of codes, and a list of reasons.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::store::Digest;
use crate::units::Bytes;

/// A cause of memory that clones would not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// A clone maps a file by decode that now has a backing: its pages are in the page cache a second time.
    Decode,
    /// The distance between address and file offset is no multiple of 2 MiB, so 2 MiB entries are impossible.
    Misaligned,
    /// Every page of a mapping is copied.
    AllCopied,
    /// Page tables are larger than the copied pages.
    PageTables,
    /// Memory outside the template mappings is larger than copied pages and page tables together.
    Overhead,
    /// All clones of the template have copied the same pages.
    CopiedByAll,
    /// Copied pages that have the bytes of the template's page again.
    EqualToTemplate,
    /// Copied pages that contain zeros, and whose page in the template does not.
    Zeros,
    /// Copied pages with equal bytes in several places.
    EqualCopies,
}

impl Code {
    /// Returns the code as a word.
    pub fn name(self) -> &'static str {
        match self {
            Code::Decode => "decode",
            Code::Misaligned => "misaligned",
            Code::AllCopied => "all-copied",
            Code::PageTables => "page-tables",
            Code::Overhead => "overhead",
            Code::CopiedByAll => "copied-by-all",
            Code::EqualToTemplate => "equal-to-template",
            Code::Zeros => "zeros",
            Code::EqualCopies => "equal-copies",
        }
    }

    /// Returns the remedy, as an imperative.
    pub fn remedy(self) -> &'static str {
        match self {
            Code::Decode => {
                "launch the clone again: a mapping from before the promotion of the file keeps decode"
            }
            Code::Misaligned => {
                "map the file at an address that is congruent to the file offset modulo 2 MiB"
            }
            Code::AllCopied => "disable prealloc and locked memory in the VMM",
            Code::PageTables => "map the template by 2 MiB entries: passthrough, and an aligned address",
            Code::Overhead => "give the VMM fewer devices, queues and threads, or use a smaller VMM",
            Code::CopiedByAll => "capture a new template from a clone that has written these pages",
            Code::EqualToTemplate => "let the guest write these pages only if they change",
            Code::Zeros => "use a balloon with free page reporting, so that the guest returns free pages",
            Code::EqualCopies => {
                "allow KSM to merge the pages, if its processor time and side channels are acceptable"
            }
        }
    }
}

/// One reason for memory of a clone or of all clones of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The cause.
    pub code: Code,
    /// Memory that the cause explains. Two reasons may explain the same bytes.
    pub bytes: Bytes,
    /// What to do.
    pub remedy: &'static str,
}

/// The reasons of a survey.
#[derive(Debug, Clone, Default)]
pub struct Reasons {
    /// Reasons of each clone, in the order of the survey.
    pub clones: Vec<Vec<Reason>>,
    /// Reasons that concern all clones of a template.
    pub templates: BTreeMap<Digest, Vec<Reason>>,
}

impl Reasons {
    pub(super) fn push(list: &mut Vec<Reason>, code: Code, bytes: Bytes) {
        if bytes > Bytes::ZERO {
            list.push(Reason { code, bytes, remedy: code.remedy() });
        }
    }

    pub(super) fn of_template(&mut self, digest: Digest, code: Code, bytes: Bytes) {
        Self::push(self.templates.entry(digest).or_default(), code, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_text_have_the_same_name() {
        for code in [
            Code::Decode,
            Code::Misaligned,
            Code::AllCopied,
            Code::PageTables,
            Code::Overhead,
            Code::CopiedByAll,
            Code::EqualToTemplate,
            Code::Zeros,
            Code::EqualCopies,
        ] {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
        }
    }
}
