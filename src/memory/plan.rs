//! Options → what will be opened and mapped. Pure: the same options give the same plan, and what must
//! be refused is refused here, in QEMU's order and words.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::sys::mapping::{NumaMode, Protection, Sharing};
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, PAGE_SIZE};

use super::note::{Note, notes_of};
use super::options::{NumaPolicy, OnOffAuto, Options};
use super::row::{OpenMode, Role, row};

/// Where the memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, from an offset.
    File {
        /// `mem-path`
        path: PathBuf,
        /// How it is opened.
        open: OpenMode,
        /// `offset`
        offset: FileOffset,
    },
    /// Anonymous memory (`memory-backend-ram`, `share=off`).
    Anonymous,
    /// A memfd of its own (`memory-backend-ram`, `share=on`).
    Memfd,
}

/// Where the host's memory is to lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numa {
    /// `policy`
    pub policy: NumaPolicy,
    /// `host-nodes`
    pub nodes: Vec<u16>,
}

impl Numa {
    /// What `mbind` is told; nothing where nothing was asked.
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

/// What is to be done to make one backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// `id`
    pub id: String,
    /// QEMU's name of the object type.
    pub type_name: &'static str,
    /// The name that messages give the memory.
    pub region: String,
    /// Where the memory comes from.
    pub source: Source,
    /// `size`, as asked.
    pub size: Bytes,
    /// `align`, where asked.
    pub align: Option<Bytes>,
    /// What the memory may be used for.
    pub protection: Protection,
    /// Who sees a write.
    pub sharing: Sharing,
    /// What the guest gets.
    pub role: Role,
    /// False: nothing is charged to `Committed_AS`.
    pub reserve: bool,
    /// `MAP_SYNC`, where the filesystem can.
    pub sync: bool,
    /// `MADV_MERGEABLE`
    pub merge: bool,
    /// Without it `MADV_DONTDUMP`.
    pub dump: bool,
    /// Where the host's memory is to lie.
    pub numa: Numa,
    /// Populate every page for writing, with at most so many threads.
    pub prealloc: Option<u32>,
    /// Populate every page for reading (Stencil's own).
    pub prefault: bool,
    /// `MADV_REMOVE` when the backend goes.
    pub discard: bool,
    /// What the user should know.
    pub notes: Vec<Note>,
}

/// What must be known of an opened file before it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileFacts {
    /// Its length in bytes; 0 where it has none (a character device).
    pub size: u64,
    /// Bytes of its smallest page: 4096, or the size of a huge page on hugetlbfs.
    pub page_size: u64,
    /// A file proper, not a device.
    pub regular: bool,
}

impl FileFacts {
    /// Of memory without a file.
    pub const NONE: FileFacts = FileFacts { size: 0, page_size: PAGE_SIZE, regular: false };
}

/// Where and how much is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes mapped, whole pages of the file.
    pub length: Bytes,
    /// Alignment of the first byte.
    pub align: Bytes,
    /// The file is empty and gets this length first.
    pub extend_to: Option<u64>,
}

/// The highest number of NUMA nodes that QEMU knows.
const MAX_NODES: u16 = 128;

/// Threads that preallocate, at most.
const MAX_PREALLOC_THREADS: u32 = 16;

impl Plan {
    /// The plan of these options.
    ///
    /// # Errors
    /// QEMU's words for what it refuses before it opens the file.
    pub(super) fn of(options: &Options) -> Result<Plan> {
        let type_name = options.object.name();
        check_properties(options, type_name)?;
        let row = match &options.file {
            Some(file) => row(options.share, file.readonly, file.rom)?,
            None => row(options.share, false, OnOffAuto::Off)?,
        };
        let source = match (&options.file, options.share) {
            (Some(file), _) => {
                Source::File { path: file.mem_path.clone(), open: row.open, offset: file.offset }
            }
            (None, true) => Source::Memfd,
            (None, false) => Source::Anonymous,
        };
        let file = options.file.as_ref();
        let mut notes = options.notes.clone();
        notes.extend(notes_of(options, file, row.role));
        let region = match options.canonical_name {
            true => format!("/objects/{}", options.id),
            false => options.id.clone(),
        };
        Ok(Plan {
            id: options.id.clone(),
            type_name,
            region,
            source,
            size: options.size,
            align: file.map(|f| f.align).filter(|align| align.get() > 0),
            protection: row.protection,
            sharing: row.sharing,
            role: row.role,
            reserve: options.reserve,
            sync: file.is_some_and(|f| f.pmem) && options.share,
            merge: options.merge,
            dump: options.dump,
            numa: Numa { policy: options.policy, nodes: options.host_nodes.clone() },
            prealloc: options
                .prealloc
                .then(|| options.prealloc_threads.unwrap_or(MAX_PREALLOC_THREADS).min(MAX_PREALLOC_THREADS)),
            prefault: options.prefault,
            discard: file.is_some_and(|f| f.discard_data),
            notes,
        })
    }

    /// The same plan without what would change the file for good.
    pub(super) fn for_trial(&self) -> Plan {
        let mut plan = self.clone();
        plan.discard = false;
        if plan.prealloc.is_some() && plan.has_file() && plan.sharing == Sharing::Shared {
            plan.leave_untouched();
        }
        plan
    }

    /// Touches no page, and says so where pages were to be touched.
    pub(super) fn leave_untouched(&mut self) {
        let wanted = self.prealloc.take().is_some() | std::mem::take(&mut self.prefault);
        if wanted {
            self.notes.push(
                Note::new("trial", "not filled here: that would allocate the whole file").bytes(self.size),
            );
        }
    }

    /// True when the memory comes from a file that was named.
    pub fn has_file(&self) -> bool {
        matches!(self.source, Source::File { .. })
    }

    /// Checks the opened file against the plan and decides what is mapped.
    ///
    /// # Errors
    /// QEMU's words for what it refuses between open and mmap; our own for an empty file.
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
            .remedy("lower size or offset, or use a longer file"));
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
            return Err(Error::failed("the backing store is empty: the guest would die of SIGBUS")
                .at(path)
                .remedy("import or make the template first"));
        }
        let length = rounded
            .checked_next_multiple_of(page)
            .ok_or_else(|| map_failed(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        // QEMU aligns to a page and so never gets a PMD; ours is 2 MiB unless something is asked.
        let wish = if self.align.is_some() { align } else { HUGE_PAGE_SIZE };
        let extend = path.is_some() && open == OpenMode::ReadWrite && facts.size == 0 && facts.regular;
        Ok(Layout {
            length: Bytes::new(length),
            align: Bytes::new(wish.max(page)),
            extend_to: extend.then_some(offset.wrapping_add(length)),
        })
    }

    /// What QEMU checks only when the memory is mapped, and what we refuse where QEMU crashes.
    ///
    /// # Errors
    /// QEMU's words; our own for `prealloc=on` on ROM.
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
                "'prealloc=on' writes every page, and this is ROM: QEMU dies of SIGSEGV",
            )
            .remedy("use prefault=on, which only reads"));
        }
        Ok(())
    }
}

/// Wrong values, in the order in which QEMU sets properties.
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

/// QEMU's words for a failed `mmap`.
pub(super) fn map_failed(cause: std::io::Error) -> Error {
    Error::failed(format!("unable to map backing store for guest RAM: {}", crate::error::errno_text(&cause)))
}

/// A page size as QEMU writes it: `4 KiB`, `2 MiB`.
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
    fn what_is_mapped_follows_file_and_options() {
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
    fn pages_of_hugetlbfs_are_the_unit_there() {
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
    fn threads_that_preallocate() {
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
    fn a_trial_leaves_out_what_cannot_be_undone() {
        let shared = plan("M,size=4M,share=on,discard-data=on,prealloc=on").unwrap();
        assert!(shared.discard && shared.prealloc.is_some());
        let trial = shared.for_trial();
        assert!(!trial.discard && trial.prealloc.is_none());
        let private = plan("M,size=4M,prealloc=on").unwrap();
        assert!(private.for_trial().prealloc.is_some(), "copies of a trial go with it");
    }
}
