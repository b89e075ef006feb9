//! The 64 bits that a pagemap has for every page.

/// One entry of a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(pub(super) u64);

/// Page table entries that look like swap and are none have this type: the last of the 32 that the
/// kernel has (`SWP_PTE_MARKER`).
const SWAP_TYPE_MARKER: u64 = 31;

impl Entry {
    /// The raw 64 bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Present in RAM and in the page table.
    pub fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// In swap, or a marker that looks so.
    pub fn is_swap(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// A page of a file or of shared memory.
    pub fn is_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// A guard region (known to the kernel since 6.15).
    pub fn is_guard(self) -> bool {
        self.0 >> 58 & 1 == 1
    }

    /// Write-protected by userfaultfd, or a marker for that.
    pub fn is_uffd_wp(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    /// The frame is mapped by this page table entry alone.
    pub fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// The frame number of a present page; nothing without `CAP_SYS_ADMIN`, which the kernel wants for it.
    pub fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        (self.is_present() && frame != 0).then_some(frame)
    }

    /// Type and offset of a swap entry.
    fn swap(self) -> Option<(u64, u64)> {
        self.is_swap().then_some((self.0 & 31, self.0 >> 5 & ((1 << 50) - 1)))
    }

    /// A marker (userfaultfd, guard, poison), which holds no page: neither RAM nor swap.
    pub fn is_marker(self) -> bool {
        self.swap().is_some_and(|(kind, _)| kind == SWAP_TYPE_MARKER)
    }

    /// Type and offset of the swap slot that holds the page, unless it is a marker.
    pub fn swap_slot(self) -> Option<(u64, u64)> {
        self.swap().filter(|(kind, _)| *kind != SWAP_TYPE_MARKER)
    }
}
