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
    /// A clone maps a file by decode because its mount can make no backing.
    DecodeFallback,
    /// Template pages are in several page caches.
    CachedTwice,
    /// Zero pages of a template are in the page cache.
    ResidentZeros,
    /// Template pages are charged to the memory cgroup of a clone, and clones outside of that cgroup share the pages.
    Charged,
    /// A VMM maps another file with the bytes of the template.
    CopiedFile,
    /// The process has requested huge pages for a mapping that cannot have them.
    HugeAdvice,
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
    /// All codes.
    #[cfg(test)]
    const ALL: [Code; 15] = [
        Code::Decode,
        Code::DecodeFallback,
        Code::CachedTwice,
        Code::ResidentZeros,
        Code::Charged,
        Code::CopiedFile,
        Code::HugeAdvice,
        Code::Misaligned,
        Code::AllCopied,
        Code::PageTables,
        Code::Overhead,
        Code::CopiedByAll,
        Code::EqualToTemplate,
        Code::Zeros,
        Code::EqualCopies,
    ];

    /// Returns the code as a word.
    pub fn name(self) -> &'static str {
        match self {
            Code::Decode => "decode",
            Code::DecodeFallback => "decode-fallback",
            Code::CachedTwice => "cached-twice",
            Code::ResidentZeros => "resident-zeros",
            Code::Charged => "charged",
            Code::CopiedFile => "copied-file",
            Code::HugeAdvice => "huge-advice",
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
            Code::DecodeFallback => "remove what keeps the mount from passthrough: 'stencil status' names it",
            Code::CachedTwice => {
                "serve the template in one way and by one mount: launch the clones of the other way again"
            }
            Code::ResidentZeros => "map long runs of zeros as anonymous memory, as the Rust library does",
            Code::Charged => {
                "read the file in another cgroup before the first clone starts: 'stencil warm', or cat(1)"
            }
            Code::CopiedFile => "give the VMM the file in the mount: 'stencil path' prints it",
            Code::HugeAdvice => "serve the file by passthrough, or let the VMM request no huge pages",
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
    /// Adds a reason to the list. The bytes of one code add up.
    pub(super) fn push(list: &mut Vec<Reason>, code: Code, bytes: Bytes) {
        if bytes == Bytes::ZERO {
            return;
        }
        match list.iter_mut().find(|reason| reason.code == code) {
            Some(reason) => reason.bytes += bytes,
            None => list.push(Reason { code, bytes, remedy: code.remedy() }),
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
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
        }
    }

    #[test]
    fn a_list_has_each_code_once() {
        let mut list = Vec::new();
        for (code, bytes) in [(Code::Charged, 3), (Code::Zeros, 0), (Code::Overhead, 1), (Code::Charged, 4)] {
            Reasons::push(&mut list, code, Bytes::new(bytes));
        }
        let found: Vec<(Code, u64)> = list.iter().map(|reason| (reason.code, reason.bytes.get())).collect();
        assert_eq!(found, [(Code::Charged, 7), (Code::Overhead, 1)]);
    }

    #[test]
    fn the_reference_has_a_row_for_each_code() {
        let page = include_str!("../../../../docs/reference/reasons.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(rows.len(), Code::ALL.len());
        for code in Code::ALL {
            let row = rows.iter().find(|row| row.starts_with(&format!("| `{}` |", code.name())));
            let row = row.unwrap_or_else(|| panic!("no row of {}", code.name()));
            let text = row.replace('`', "'");
            assert!(text.ends_with(&format!("| {} |", code.remedy())), "{row}\n{}", code.remedy());
        }
    }
}
