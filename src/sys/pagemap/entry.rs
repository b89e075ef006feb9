//! The 64 bits that a pagemap has for every page.

/// One entry of a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(pub(super) u64);

/// Of the 32 types that an entry with the swap bit may have, a kernel with all options built in leaves so
/// many to swap areas (`MAX_SWAPFILES`); areas are numbered from 0.
const SWAP_AREAS: u64 = 23;

/// The last type: a marker that holds no page (`SWP_PTE_MARKER`). Those between are pages on their way to
/// another frame, pages of devices, and poisoned ones.
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

    /// Not present, but not empty: in swap, on its way to another frame, or a marker.
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

    /// Neither present nor in a swap slot nor a marker: the kernel moves the page to another frame (compaction), or the page
    /// is of a device or poisoned. A move ends within microseconds.
    pub fn is_moving(self) -> bool {
        self.swap().is_some_and(|(kind, _)| kind >= SWAP_AREAS && kind != SWAP_TYPE_MARKER)
    }

    /// Area and offset of the swap slot that holds the page, where one does. Without `CAP_SYS_ADMIN` the
    /// kernel hides both, and everything with the swap bit looks like slot (0, 0).
    pub fn swap_slot(self) -> Option<(u64, u64)> {
        self.swap().filter(|(kind, _)| *kind < SWAP_AREAS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWAP: u64 = 1 << 62;

    #[test]
    fn what_has_the_swap_bit_is_told_apart_by_its_type() {
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
    fn a_frame_is_of_a_present_page_only() {
        assert_eq!(Entry(1 << 63 | 1 << 56 | 0x1234).frame(), Some(0x1234));
        assert_eq!(Entry(SWAP | 0x1234).frame(), None);
        assert_eq!(Entry(1 << 63).frame(), None, "hidden from this caller");
    }
}
