//! The plan of a backend: how the file is opened and mapped. Planning is pure. Invalid options are rejected in QEMU's
//! order and with QEMU's texts.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::sys::memory::mapping::{NumaMode, Protection, Sharing};
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, PAGE_SIZE};

use super::note::Note;
use super::option_notes::notes_of;
use super::options::{NumaPolicy, OnOffAuto, Options};
use super::row::{OpenMode, Role, row};

/// Source of the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file.
    File {
        /// `mem-path`
        path: PathBuf,
        /// Open mode.
        open: OpenMode,
        /// `offset`
        offset: FileOffset,
    },
    /// Anonymous memory (`memory-backend-ram`, `share=off`).
    Anonymous,
    /// A new memfd (`memory-backend-ram`, `share=on`).
    Memfd,
}

/// NUMA placement of the host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numa {
    /// `policy`
    pub policy: NumaPolicy,
    /// `host-nodes`
    pub nodes: Vec<u16>,
}

impl Numa {
    /// Returns the mode for mbind(2), or `None` for the default policy.
    pub(super) fn mode(&self) -> Option<NumaMode> {
        match self.policy {
            NumaPolicy::Default => None,
            NumaPolicy::Preferred => Some(NumaMode::Preferred),
            NumaPolicy::Bind => Some(NumaMode::Bind),
            NumaPolicy::Interleave => Some(NumaMode::Interleave),
        }
    }

    fn check(&self) -> Result<()> {
        match (self.policy, self.nodes.is_empty()) {
            (NumaPolicy::Default, false) => Err(Error::usage(
                "host-nodes must be empty for policy default, or you should explicitly specify a policy \
                 other than default",
            )),
            (NumaPolicy::Default, true) | (_, false) => Ok(()),
            (policy, true) => {
                Err(Error::usage(format!("host-nodes must be set for policy {}", policy.name())))
            }
        }
    }
}

/// All parameters to create one backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `id`
    pub id: String,
    /// QEMU's name of the object type.
    pub type_name: &'static str,
    /// Name of the memory in messages.
    pub region: String,
    /// Source of the memory.
    pub source: Source,
    /// `size`, before rounding.
    pub size: Bytes,
    /// `align`; `None` if not set.
    pub align: Option<Bytes>,
    /// Access permissions.
    pub protection: Protection,
    /// Visibility of writes.
    pub sharing: Sharing,
    /// Kind of memory from the point of view of the guest.
    pub role: Role,
    /// If false, nothing is charged to `Committed_AS`.
    pub reserve: bool,
    /// Use `MAP_SYNC` if the file system supports it.
    pub sync: bool,
    /// `MADV_MERGEABLE`
    pub merge: bool,
    /// If false, `MADV_DONTDUMP`.
    pub dump: bool,
    /// NUMA placement of the host memory.
    pub numa: Numa,
    /// Populate every page for writing with at most this many threads.
    pub prealloc: Option<u32>,
    /// Populate every page for reading (Stencil only).
    pub prefault: bool,
    /// Map zero runs of a template's file on a Stencil mount as anonymous memory (Stencil only).
    pub anonymous_zeros: bool,
    /// `MADV_REMOVE` when the backend is dropped.
    pub discard: bool,
    /// Notes for the user.
    pub notes: Vec<Note>,
}

/// Properties of an open file that affect the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// Length in bytes; 0 for files without a length (character devices).
    pub size: u64,
    /// Size of the smallest page in bytes: 4096, or the huge page size on hugetlbfs.
    pub page_size: u64,
    /// True for a regular file, false for a device.
    pub regular: bool,
}

impl FileFacts {
    /// The properties of memory without a file.
    pub const NONE: FileFacts = FileFacts { size: 0, page_size: PAGE_SIZE, regular: false };
}

/// Length and alignment of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Length of the mapping, a multiple of the file's page size.
    pub length: Bytes,
    /// Alignment of the first byte.
    pub align: Bytes,
    /// Length in bytes to which an empty file must be extended first.
    pub extend_to: Option<u64>,
}

/// Maximum number of host NUMA nodes, the limit of QEMU.
const MAX_NODES: u16 = 128;

/// Maximum number of preallocating threads.
const MAX_PREALLOC_THREADS: u32 = 16;

impl Options {
    /// Creates the plan for these options, without any system call.
    ///
    /// # Errors
    /// Returns QEMU's error for everything that QEMU rejects before it opens the file.
    pub fn plan(&self) -> Result<Plan> {
        let type_name = self.object.name();
        check_properties(self, type_name)?;
        let row = match &self.file {
            Some(file) => row(self.share, file.readonly, file.rom)?,
            None => row(self.share, false, OnOffAuto::Off)?,
        };
        let source = match (&self.file, self.share) {
            (Some(file), _) => {
                Source::File { path: file.mem_path.clone(), open: row.open, offset: file.offset }
            }
            (None, true) => Source::Memfd,
            (None, false) => Source::Anonymous,
        };
        let file = self.file.as_ref();
        let mut notes = self.notes.clone();
        notes.extend(notes_of(self, file, row.role));
        let region = match self.canonical_name {
            true => format!("/objects/{}", self.id),
            false => self.id.clone(),
        };
        Ok(Plan {
            id: self.id.clone(),
            type_name,
            region,
            source,
            size: self.size,
            align: file.map(|f| f.align).filter(|align| align.get() > 0),
            protection: row.protection,
            sharing: row.sharing,
            role: row.role,
            reserve: self.reserve,
            sync: file.is_some_and(|f| f.pmem) && self.share,
            merge: self.merge,
            dump: self.dump,
            numa: Numa { policy: self.policy, nodes: self.host_nodes.clone() },
            prealloc: self
                .prealloc
                .then(|| self.prealloc_threads.unwrap_or(MAX_PREALLOC_THREADS).min(MAX_PREALLOC_THREADS)),
            prefault: self.prefault,
            anonymous_zeros: self.anonymous_zeros && row.role == Role::Template,
            discard: file.is_some_and(|f| f.discard_data),
            notes,
        })
    }
}

impl Plan {
    /// Returns the same plan without the steps that would permanently change the file.
    pub(super) fn for_trial(&self) -> Plan {
        let mut plan = self.clone();
        plan.discard = false;
        // A trial maps the file alone, as QEMU would.
        plan.anonymous_zeros = false;
        if plan.prealloc.is_some() && plan.has_file() && plan.sharing == Sharing::Shared {
            plan.leave_untouched();
        }
        plan
    }

    /// Disables preallocation and prefaulting, and adds a note if either was requested.
    pub(super) fn leave_untouched(&mut self) {
        let wanted = self.prealloc.take().is_some() | std::mem::take(&mut self.prefault);
        if wanted {
            self.notes.push(
                Note::new("trial", "pages are not populated: that would allocate the whole file")
                    .bytes(self.size),
            );
        }
    }

    /// Returns true if the memory comes from a named file.
    pub fn has_file(&self) -> bool {
        matches!(self.source, Source::File { .. })
    }

    /// Checks the opened file against the plan and returns the layout of the mapping.
    ///
    /// # Errors
    /// Returns QEMU's error for everything that QEMU rejects between open and mmap, and Stencil's own error for an
    /// empty file.
    pub fn layout(&self, facts: &FileFacts) -> Result<Layout> {
        let page = facts.page_size;
        let rounded = self.size.get().checked_next_multiple_of(PAGE_SIZE).unwrap_or(0);
        let (offset, path, open) = match &self.source {
            Source::File { path, open, offset } => (offset.get(), Some(path), *open),
            Source::Anonymous | Source::Memfd => (0, None, OpenMode::ReadWrite),
        };
        let end = offset.wrapping_add(rounded);
        if path.is_some() && facts.size > 0 && facts.size < end {
            return Err(Error::failed(format!(
                "{} backing store size {:#x} is too small for 'size' option {rounded:#x} plus 'offset' \
                 option {offset:#x}",
                self.region, facts.size
            ))
            .hint("lower size or offset, or use a longer file"));
        }
        let align = self.align.map_or(0, Bytes::get);
        if !align.is_multiple_of(page) {
            return Err(Error::usage(format!(
                "alignment {align:#x} must be multiples of page size {page:#x}"
            )));
        }
        if align > 0 && !align.is_power_of_two() {
            return Err(Error::usage(format!("alignment {align:#x} must be a power of two")));
        }
        if !offset.is_multiple_of(page) {
            return Err(Error::usage(format!("offset {offset:#x} must be multiples of page size {page:#x}")));
        }
        if rounded < page {
            return Err(Error::usage(format!(
                "memory size {rounded:#x} must be equal to or larger than page size {page:#x}"
            )));
        }
        if let (Some(path), OpenMode::ReadOnly, true, 0) = (path, open, facts.regular, facts.size) {
            return Err(Error::failed("backing store is empty: guest accesses would raise SIGBUS")
                .at(path)
                .hint("import or create the template first"));
        }
        let length = rounded
            .checked_next_multiple_of(page)
            .ok_or_else(|| map_failed(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        // QEMU aligns to a page, which rules out PMD mappings. Stencil aligns to 2 MiB unless `align` is set.
        let alignment = if self.align.is_some() { align } else { HUGE_PAGE_SIZE };
        let extend = path.is_some() && open == OpenMode::ReadWrite && facts.size == 0 && facts.regular;
        Ok(Layout {
            length: Bytes::new(length),
            align: Bytes::new(alignment.max(page)),
            extend_to: extend.then_some(offset.wrapping_add(length)),
        })
    }

    /// Checks conditions that QEMU checks only after the memory is mapped, and conditions under which QEMU crashes.
    ///
    /// # Errors
    /// Returns QEMU's error, and Stencil's own error for `prealloc=on` on ROM.
    pub fn check_mapped(&self, facts: &FileFacts) -> Result<()> {
        if self.has_file() && !self.size.get().is_multiple_of(facts.page_size) {
            return Err(Error::usage(format!(
                "backend '{}' memory size must be multiple of {}",
                self.type_name,
                qemu_size(facts.page_size)
            )));
        }
        self.numa.check()?;
        if self.prealloc.is_some() && self.protection == Protection::Read {
            return Err(Error::usage(
                "'prealloc=on' is not supported on ROM: preallocation writes every page (QEMU crashes with SIGSEGV)",
            )
            .hint("use prefault=on, which only reads"));
        }
        Ok(())
    }
}

/// Checks property values in the order in which QEMU sets the properties.
fn check_properties(options: &Options, type_name: &str) -> Result<()> {
    if let Some(context) = &options.prealloc_context {
        return Err(Error::usage(format!("Device '{context}' not found")));
    }
    if options.prealloc && !options.reserve {
        return Err(Error::usage("'prealloc=on' and 'reserve=off' are incompatible"));
    }
    if let Some(node) = options.host_nodes.iter().find(|node| **node >= MAX_NODES) {
        return Err(Error::usage(format!("Invalid host-nodes value: {node}")));
    }
    let zero = |name: &str| Error::usage(format!("property '{name}' of {type_name} doesn't take value '0'"));
    if options.prealloc_threads == Some(0) {
        return Err(zero("prealloc-threads"));
    }
    if options.size == Bytes::ZERO {
        return Err(zero("size"));
    }
    Ok(())
}

/// Returns QEMU's error for a failed mmap(2).
pub(super) fn map_failed(cause: std::io::Error) -> Error {
    Error::failed(format!("unable to map backing store for guest RAM: {}", crate::error::errno_text(&cause)))
}

/// Formats a page size like QEMU: `4 KiB`, `2 MiB`.
fn qemu_size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<Plan> {
        let text = text.replacen('M', "memory-backend-file,id=m,mem-path=/f", 1);
        Options::parse(&text)?.plan()
    }

    const FILE: FileFacts = FileFacts { size: 4 << 20, page_size: 4096, regular: true };

    #[test]
    fn layout_depends_on_file_and_options() {
        let mib = 1 << 20;
        for (text, length, align) in [
            ("M,size=4M", 4 * mib, 2 * mib),
            ("M,size=4M,align=4k", 4 * mib, 4096),
            ("M,size=1M,offset=3M,align=64k", mib, 65536),
            ("M,size=1M,align=1G", mib, 1 << 30),
            ("memory-backend-ram,id=m,size=10000", 12288, 2 * mib),
        ] {
            let plan = plan(text).unwrap();
            let facts = if plan.has_file() { FILE } else { FileFacts::NONE };
            let expected = Layout { length: Bytes::new(length), align: Bytes::new(align), extend_to: None };
            assert_eq!(plan.layout(&facts).unwrap(), expected, "{text}");
            plan.check_mapped(&facts).unwrap();
        }
        let empty = FileFacts { size: 0, ..FILE };
        let layout = plan("M,size=4M,offset=1M").unwrap().layout(&empty).unwrap();
        assert_eq!(layout.extend_to, Some(5 << 20));
        assert!(plan("M,size=4M,readonly=on").unwrap().layout(&empty).is_err());
    }

    #[test]
    fn hugetlbfs_pages_are_the_unit_of_checks() {
        let huge = FileFacts { size: 8 << 20, page_size: 2 << 20, regular: true };
        for (text, words) in [
            ("M,size=4M,align=64k", "alignment 0x10000 must be multiples of page size 0x200000"),
            ("M,size=4M,offset=4k", "offset 0x1000 must be multiples of page size 0x200000"),
            ("M,size=1M", "memory size 0x100000 must be equal to or larger than page size 0x200000"),
        ] {
            assert_eq!(plan(text).unwrap().layout(&huge).unwrap_err().message(), words, "{text}");
        }
        let odd = plan("M,size=3M").unwrap();
        assert_eq!(odd.layout(&huge).unwrap().length, Bytes::new(4 << 20));
        let words = "backend 'memory-backend-file' memory size must be multiple of 2 MiB";
        assert_eq!(odd.check_mapped(&huge).unwrap_err().message(), words);
    }

    #[test]
    fn limits_preallocating_threads() {
        for (text, threads) in [
            ("M,size=4M", None),
            ("M,size=4M,prealloc=on", Some(16)),
            ("M,size=4M,prealloc=on,prealloc-threads=3", Some(3)),
            ("M,size=4M,prealloc=on,prealloc-threads=4000000000", Some(16)),
        ] {
            assert_eq!(plan(text).unwrap().prealloc, threads, "{text}");
        }
    }

    #[test]
    fn trial_omits_permanent_changes() {
        let shared = plan("M,size=4M,share=on,discard-data=on,prealloc=on").unwrap();
        assert!(shared.discard && shared.prealloc.is_some());
        let trial = shared.for_trial();
        assert!(!trial.discard && trial.prealloc.is_none());
        let private = plan("M,size=4M,prealloc=on").unwrap();
        assert!(private.for_trial().prealloc.is_some(), "private copies end with the trial");
    }
}
