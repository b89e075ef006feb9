//! Guest memory regions of the crate vm-memory (rust-vmm) over an owned mapping.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::sys::memory::mapping::{Mapping, Protection, Sharing};
use crate::sys::memory::pagemap::Pagemap;
use crate::units::{MemoryOffset, PAGE_SIZE, to_usize};

/// The dirty bitmap of a guest memory region: the pages that this process has copied. The bitmap owns the mapping, so
/// that the memory stays mapped while the region exists.
///
/// The kernel keeps this bitmap in the page tables: the first store to a page of a private mapping copies the page,
/// whether a vCPU, a device model or vhost makes the store. So [`mark_dirty`](Bitmap::mark_dirty) has nothing to do,
/// and [`dirty_at`](Bitmap::dirty_at) asks the kernel with one `PAGEMAP_SCAN`.
///
/// A page stays dirty until it is unmapped: dirty means different from the template, not changed since a point in time.
/// For the rounds of a live migration, use `KVM_GET_DIRTY_LOG` and an `AtomicBitmap`.
///
/// Every page counts as dirty if the kernel has no answer: in shared memory, whose writes go to the file and copy
/// nothing, and after an error of the system call.
#[derive(Debug)]
pub struct CopiedPages {
    mapping: Arc<Mapping>,
    pagemap: Pagemap,
    /// Addresses of the region, page-aligned and inside the mapping.
    range: Range<u64>,
    /// The owner of the memory, which must live as long as the mapping is used.
    _owner: Arc<dyn Debug + Send + Sync>,
}

impl<'a> WithBitmapSlice<'a> for CopiedPages {
    type S = RefSlice<'a, CopiedPages>;
}

impl Bitmap for CopiedPages {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, offset: usize) -> bool {
        let start = self.range.start.saturating_add(offset as u64) / PAGE_SIZE * PAGE_SIZE;
        self.range.contains(&start)
            && (self.mapping.sharing() == Sharing::Shared
                || self.pagemap.dirty(start..start + PAGE_SIZE).map_or(true, |found| !found.is_empty()))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, CopiedPages> {
        RefSlice::new(self, offset)
    }
}

/// Creates a region of a part of the mapping, given as byte offsets. The region owns `mapping` and `owner`.
///
/// # Errors
/// Returns `InvalidInput` if the part is empty, not page-aligned or outside of the mapping.
pub fn guest_region(
    mapping: &Arc<Mapping>,
    pagemap: Pagemap,
    part: &Range<u64>,
    flags: i32,
    file: Option<FileOffset>,
    owner: Arc<dyn Debug + Send + Sync>,
) -> io::Result<MmapRegion<CopiedPages>> {
    let is_aligned = part.start.is_multiple_of(PAGE_SIZE) && part.end.is_multiple_of(PAGE_SIZE);
    let length = part.end.checked_sub(part.start).filter(|length| is_aligned && *length > 0);
    let length = to_usize(length.ok_or(io::ErrorKind::InvalidInput)?);
    let address = mapping.inside(MemoryOffset::new(part.start), length)?;
    let range = address as u64..(address + length) as u64;
    let bitmap = CopiedPages { mapping: mapping.clone(), pagemap, range, _owner: owner };
    let protection = match mapping.protection() {
        Protection::Read => libc::PROT_READ,
        Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: the address range lies inside `mapping` (checked above), to which no Rust reference exists. The region
    // owns its bitmap and never gives it away, and the bitmap owns the mapping: the memory outlives the region.
    let mut builder = unsafe {
        MmapRegionBuilder::new_with_bitmap(length, bitmap).with_raw_mmap_pointer(address as *mut u8)
    };
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    builder.with_mmap_prot(protection).with_mmap_flags(flags).build().map_err(io::Error::other)
}
