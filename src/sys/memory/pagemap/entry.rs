//! The 64-bit entry of one page in a pagemap.

/// One entry of a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(pub(super) u64);

/// Number of swap types that are swap areas (`MAX_SWAPFILES`) in a kernel with all related options. An entry with the
/// swap bit has one of 32 types; the areas are numbered from 0.
const SWAP_AREAS: u64 = 23;

/// The last swap type: a marker without a page (`SWP_PTE_MARKER`). The types in between are pages under migration,
/// device pages and poisoned pages.
const SWAP_TYPE_MARKER: u64 = 31;

impl Entry {
    /// Returns true if the page is present in memory and in the page table.
    pub fn is_present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// Returns true if the page is not present but its entry is not empty: in swap, under migration, or a marker.
    pub fn is_swap(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// Returns true for a page of a file or of shared memory.
    pub fn is_file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// Returns true if exactly one page table entry, over all processes, maps the page. If the kernel does not count
    /// the entries of each page (`CONFIG_NO_PAGE_MAPCOUNT`), returns false for some of these pages.
    pub fn is_exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// Returns true for a guard region (reported since Linux 6.15).
    pub fn is_guard(self) -> bool {
        self.0 >> 58 & 1 == 1
    }

    /// Returns the frame number of a present page. The kernel shows frame numbers only with `CAP_SYS_ADMIN`.
    pub fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        (self.is_present() && frame != 0).then_some(frame)
    }

    /// Returns type and offset of a swap entry.
    fn swap(self) -> Option<(u64, u64)> {
        self.is_swap().then_some((self.0 & 31, self.0 >> 5 & ((1 << 50) - 1)))
    }

    /// Returns true for a marker (userfaultfd, guard, poison), which has a page neither in memory nor in swap.
    pub fn is_marker(self) -> bool {
        self.swap().is_some_and(|(kind, _)| kind == SWAP_TYPE_MARKER)
    }

    /// Returns true if the page is neither present nor in a swap slot, and the entry is not a marker: the kernel
    /// migrates the page to another frame (compaction), or the page is a device page or poisoned. A migration takes
    /// microseconds.
    pub fn is_moving(self) -> bool {
        self.swap().is_some_and(|(kind, _)| kind >= SWAP_AREAS && kind != SWAP_TYPE_MARKER)
    }

    /// Returns area and offset of the swap slot of the page. Without `CAP_SYS_ADMIN` the kernel hides both, and every
    /// entry with the swap bit looks like slot (0, 0).
    pub fn swap_slot(self) -> Option<(u64, u64)> {
        self.swap().filter(|(kind, _)| *kind < SWAP_AREAS)
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::memory::pagemap::entry::*;

    const SWAP: u64 = 1 << 62;

    #[test]
    fn classifies_swap_entries_by_type() {
        for (bits, slot, marker) in [
            (SWAP | 77 << 5, Some((0, 77)), false),
            (SWAP | 5 << 5 | 2, Some((2, 5)), false),
            (SWAP | 1 << 57 | 5 << 5, Some((0, 5)), false),
            (SWAP | 1234 << 5 | 25, None, false),
            (SWAP | 1 << 57 | 1 << 5 | 31, None, true),
            (1 << 63 | 77 << 5, None, false),
            (0, None, false),
        ] {
            let entry = Entry(bits);
            assert_eq!((entry.swap_slot(), entry.is_marker()), (slot, marker), "{bits:#x}");
            assert_eq!(entry.is_moving(), entry.is_swap() && slot.is_none() && !marker, "{bits:#x}");
        }
    }

    #[test]
    fn only_present_pages_have_a_frame() {
        assert_eq!(Entry(1 << 63 | 1 << 56 | 0x1234).frame(), Some(0x1234));
        assert_eq!(Entry(SWAP | 0x1234).frame(), None);
        assert_eq!(Entry(1 << 63).frame(), None, "hidden without CAP_SYS_ADMIN");
    }
}
