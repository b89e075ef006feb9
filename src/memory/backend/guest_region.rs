//! Guest memory regions of the crate vm-memory (rust-vmm).

use std::ops::Range;

use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::Backend;
use crate::error::{Error, Result, errno_text};
use crate::sys::memory::guest_region::{self, CopiedPages};
use crate::sys::memory::mapping::Sharing;
use crate::sys::memory::pagemap::Pagemap;

impl Backend {
    /// Returns a part of the memory as a region of guest memory that begins at the guest address `base`. `part` is in
    /// bytes from the start of the memory. The region keeps the memory mapped, also after the last handle is dropped.
    ///
    /// The region has a `FileOffset` only if the memory is shared: a vhost-user process that maps the file of private
    /// memory would miss every page that the guest has written. [`Backend::fd`] returns the file in both cases.
    ///
    /// ```
    /// use stencilfs::memory::Backend;
    /// use stencilfs::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let template = tempfile::NamedTempFile::new()?;
    /// # std::fs::write(template.path(), vec![7; 1 << 20])?;
    /// # let path = template.path();
    /// let memory = Backend::template(path)?;
    /// // The part from 512 KiB on is at 4 GiB of the guest.
    /// let ram = GuestMemoryMmap::from_regions(vec![
    ///     memory.guest_region(GuestAddress(0), 0..512 << 10)?,
    ///     memory.guest_region(GuestAddress(4 << 30), 512 << 10..1 << 20)?,
    /// ])?;
    /// ram.write_obj(1u64, GuestAddress((4 << 30) + 0x1000))?;
    /// let dirty = memory.dirty()?;
    /// assert_eq!(dirty.len(), 1);
    /// assert_eq!(dirty[0].pages(), 129..130);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the part is empty, not page-aligned or outside of the
    /// memory, or if the region would exceed the guest's address space, and an error if `/proc/self/pagemap` cannot be
    /// opened.
    pub fn guest_region(&self, base: GuestAddress, part: Range<u64>) -> Result<GuestRegionMmap<CopiedPages>> {
        let refused = |why: &str| {
            let (Range { start, end }, id) = (&part, &self.0.plan.id);
            let place =
                format!("cannot place {start:#x}-{end:#x} of memory '{id}' at guest address {:#x}", base.0);
            Error::usage(format!("{place}: {why}"))
        };
        let shared = self.0.file.as_ref().filter(|_| self.sharing() == Sharing::Shared);
        let file =
            shared.map(|file| FileOffset::from_arc(file.clone(), self.file_offset().get() + part.start));
        let pagemap = Pagemap::this_process()?;
        let region =
            guest_region::guest_region(&self.0.mapping, pagemap, &part, self.flags(), file, self.0.clone())
                .map_err(|e| refused(&errno_text(&e)))?;
        GuestRegionMmap::new(region, base).ok_or_else(|| {
            refused(
                "the address space of a guest ends before this \
            address",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;

    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;
    use crate::error::Code;
    use crate::memory::options::Options;
    use crate::units::PAGE_SIZE;

    const SIZE: u64 = 2 << 20;
    const HIGH: u64 = 4 << 30;

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        file
    }

    fn object(file: &tempfile::NamedTempFile, options: &str) -> Backend {
        let path = file.path().display();
        Backend::from_text(&format!("memory-backend-file,id=m,size=2M,mem-path={path},{options}")).unwrap()
    }

    /// The memory in two regions, of which the second starts at the middle of the memory.
    fn regions(memory: &Backend) -> GuestMemoryMmap<CopiedPages> {
        GuestMemoryMmap::from_regions(vec![
            memory.guest_region(GuestAddress(0), 0..SIZE / 2).unwrap(),
            memory.guest_region(GuestAddress(HIGH), SIZE / 2..SIZE).unwrap(),
        ])
        .unwrap()
    }

    /// Pages of the memory that the bitmaps of both regions contain.
    fn marked(ram: &GuestMemoryMmap<CopiedPages>) -> BTreeSet<u64> {
        let dirty = |(region, first): (&GuestRegionMmap<CopiedPages>, u64)| {
            let pages = 0..region.len() / PAGE_SIZE;
            let is_dirty = |page: &u64| region.bitmap().dirty_at((page * PAGE_SIZE + 123) as usize);
            pages.filter(is_dirty).map(|page| first + page).collect::<Vec<_>>()
        };
        ram.iter().zip([0, SIZE / 2 / PAGE_SIZE]).flat_map(dirty).collect()
    }

    #[test]
    fn bitmaps_contain_exactly_the_copied_pages() {
        let file = file();
        let memory = object(&file, "readonly=on,rom=off");
        let ram = regions(&memory);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(HIGH + 5)).unwrap(), 7);
        assert_eq!(marked(&ram), BTreeSet::new(), "a read copies nothing");
        // Stores of vm-memory, across a page border, and of other code.
        ram.write_slice(&[1; 16], GuestAddress(3 * PAGE_SIZE - 8)).unwrap();
        ram.write_obj(1u8, GuestAddress(HIGH + 9 * PAGE_SIZE)).unwrap();
        memory.write_at(crate::units::MemoryOffset::new(SIZE - 1), b"x").unwrap();
        let half = SIZE / 2 / PAGE_SIZE;
        let written = BTreeSet::from([2, 3, half + 9, 2 * half - 1]);
        assert_eq!(marked(&ram), written);
        let dirty = memory.dirty().unwrap();
        assert_eq!(dirty.iter().flat_map(|range| range.pages()).collect::<BTreeSet<_>>(), written);
        // A slice of the bitmap, and an offset after the end of the region.
        let region = ram.iter().next().unwrap();
        assert!(
            region.get_slice(vm_memory::MemoryRegionAddress(2 * PAGE_SIZE), 1).unwrap().bitmap().dirty_at(0)
        );
        assert!(!region.bitmap().dirty_at((SIZE / 2 + 9 * PAGE_SIZE) as usize));
        assert!(fs::read(file.path()).unwrap().iter().all(|byte| *byte == 7));
    }

    #[test]
    fn bitmaps_contain_exactly_the_copied_pages_of_zero_runs() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 * SIZE).unwrap();
        let text = format!(
            "memory-backend-file,id=m,size=8M,mem-path={},readonly=on,rom=off",
            file.path().display()
        );
        let plan = Options::parse(&text).unwrap().plan().unwrap();
        let run = SIZE..3 * SIZE;
        let memory = Backend::make(plan, false, Some(std::slice::from_ref(&run))).unwrap();
        // The regions meet in the middle of the run.
        let regions = vec![
            memory.guest_region(GuestAddress(0), 0..2 * SIZE).unwrap(),
            memory.guest_region(GuestAddress(HIGH), 2 * SIZE..4 * SIZE).unwrap(),
        ];
        let ram = GuestMemoryMmap::<CopiedPages>::from_regions(regions).unwrap();
        let mut bytes = vec![1; 2 * SIZE as usize];
        ram.read_slice(&mut bytes, GuestAddress(HIGH)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        ram.write_obj(1u64, GuestAddress(2 * SIZE - 8)).unwrap();
        ram.write_obj(1u64, GuestAddress(HIGH + 5 * PAGE_SIZE)).unwrap();
        ram.write_obj(1u64, GuestAddress(0)).unwrap();
        let dirty: Vec<_> = memory.dirty().unwrap().iter().flat_map(|range| range.pages()).collect();
        assert_eq!(dirty, [0, 2 * SIZE / PAGE_SIZE - 1, 2 * SIZE / PAGE_SIZE + 5]);
        let regions: Vec<_> = ram.iter().collect();
        let is_dirty =
            |region: usize, page: u64| regions[region].bitmap().dirty_at((page * PAGE_SIZE) as usize);
        let last = 2 * SIZE / PAGE_SIZE - 1;
        assert_eq!([0, 1, last - 1, last].map(|page| is_dirty(0, page)), [true, false, false, true]);
        assert_eq!([0, 4, 5, 6].map(|page| is_dirty(1, page)), [false, false, true, false]);
    }

    #[test]
    fn a_region_keeps_the_memory_mapped() {
        let file = file();
        let memory = object(&file, "share=on,discard-data=on");
        let region = memory.guest_region(GuestAddress(0), 0..SIZE).unwrap();
        let mapping = region.get_mmap();
        drop((memory, region));
        assert_eq!(mapping.size() as u64, SIZE);
        let is_mapped =
            || fs::read_to_string("/proc/self/maps").unwrap().contains(file.path().to_str().unwrap());
        assert!(is_mapped());
        assert_eq!(fs::read(file.path()).unwrap()[0], 7, "the file is discarded with the last user");
        drop(mapping);
        assert!(!is_mapped());
        assert_eq!(fs::read(file.path()).unwrap()[0], 0);
    }

    #[test]
    fn only_shared_memory_has_a_file_offset_and_no_bitmap() {
        let file = file();
        let private = object(&file, "readonly=on,rom=off");
        let region = private.guest_region(GuestAddress(0), 0..SIZE).unwrap();
        assert!(region.file_offset().is_none());
        assert_eq!((region.prot(), region.flags()), (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE));
        let shared = object(&file, "share=on");
        let region = shared.guest_region(GuestAddress(0), PAGE_SIZE..SIZE).unwrap();
        assert_eq!(region.file_offset().unwrap().start(), PAGE_SIZE);
        region.write_obj(9u8, vm_memory::MemoryRegionAddress(0)).unwrap();
        let mut byte = [0];
        File::open(file.path()).unwrap().read_exact_at(&mut byte, PAGE_SIZE).unwrap();
        assert_eq!(byte, [9]);
        assert!(region.bitmap().dirty_at(0) && region.bitmap().dirty_at(5 * PAGE_SIZE as usize));
        let rom = object(&file, "readonly=on").guest_region(GuestAddress(0), 0..SIZE).unwrap();
        assert_eq!(rom.prot(), libc::PROT_READ);
    }

    #[test]
    fn refuses_parts_that_are_no_pages_of_the_memory() {
        let memory = object(&file(), "readonly=on,rom=off");
        for (base, part) in [
            (0, 0..0),
            (0, 0..100),
            (0, 1..PAGE_SIZE),
            (0, PAGE_SIZE..SIZE + PAGE_SIZE),
            (u64::MAX - 5, 0..SIZE),
        ] {
            let error = memory.guest_region(GuestAddress(base), part.clone()).unwrap_err();
            assert_eq!(error.code(), Code::Usage, "{base} {part:?}");
        }
    }
}
