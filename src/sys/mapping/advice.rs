//! What a mapping's owner tells the kernel about it: advice, and where its memory is to lie.

/// Advice to the kernel about a whole mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_HUGEPAGE`
    HugePage,
    /// `MADV_DONTFORK`: a forked child has no such mapping.
    DontFork,
    /// `MADV_MERGEABLE`: copied pages may be merged by KSM.
    Mergeable,
    /// `MADV_DONTDUMP`: not in core dumps.
    DontDump,
    /// `MADV_RANDOM`: no readahead.
    Random,
    /// `MADV_POPULATE_READ`: fill the page tables without copying.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`: as if every page were written.
    PopulateWrite,
    /// `MADV_REMOVE`: punch the pages out of the file.
    Remove,
    /// `MADV_PAGEOUT`: write to swap, or drop what a file still holds.
    PageOut,
    /// `MADV_GUARD_INSTALL` (kernel 6.13): any access is SIGSEGV from now on.
    GuardInstall,
    /// `MADV_GUARD_REMOVE`
    GuardRemove,
}

impl Advice {
    pub(super) fn number(self) -> libc::c_int {
        match self {
            Advice::HugePage => libc::MADV_HUGEPAGE,
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::DontDump => libc::MADV_DONTDUMP,
            Advice::Random => libc::MADV_RANDOM,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::PageOut => libc::MADV_PAGEOUT,
            Advice::GuardInstall => 102,
            Advice::GuardRemove => 103,
        }
    }
}

/// NUMA memory policy of a range, as `mbind` knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumaMode {
    /// `MPOL_DEFAULT`
    Default,
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
            NumaMode::Default => 0,
            NumaMode::Preferred => 5,
            NumaMode::Bind => 2,
            NumaMode::Interleave => 3,
        }
    }
}
