//! Arguments of madvise(2) and mbind(2).

/// Advice for madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_HUGEPAGE`
    HugePage,
    /// `MADV_NOHUGEPAGE`
    NoHugePage,
    /// `MADV_DONTFORK`: the range is not mapped in forked children.
    DontFork,
    /// `MADV_MERGEABLE`: KSM may merge copied pages.
    Mergeable,
    /// `MADV_DONTDUMP`: excluded from core dumps.
    DontDump,
    /// `MADV_RANDOM`: no readahead.
    Random,
    /// `MADV_POPULATE_READ`: prefault page tables readable, without copy-on-write.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`: prefault page tables writable, as a write to every page would.
    PopulateWrite,
    /// `MADV_REMOVE`: punch a hole into the file.
    Remove,
    /// `MADV_PAGEOUT`: reclaim pages, to swap or by dropping clean file pages.
    PageOut,
}

impl Advice {
    pub(super) fn number(self) -> libc::c_int {
        match self {
            Advice::HugePage => libc::MADV_HUGEPAGE,
            Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::DontDump => libc::MADV_DONTDUMP,
            Advice::Random => libc::MADV_RANDOM,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::PageOut => libc::MADV_PAGEOUT,
        }
    }
}

/// NUMA memory policy of a range, the mode of mbind(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumaMode {
    /// `MPOL_PREFERRED_MANY`
    Preferred,
    /// `MPOL_BIND`
    Bind,
    /// `MPOL_INTERLEAVE`
    Interleave,
}

impl NumaMode {
    pub(super) fn number(self) -> libc::c_long {
        match self {
            NumaMode::Preferred => 5,
            NumaMode::Bind => 2,
            NumaMode::Interleave => 3,
        }
    }
}
