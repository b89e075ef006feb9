//! An owned mapping that is laid out as QEMU lays out guest memory: an inaccessible reservation, the memory inside it
//! at the requested alignment, and one inaccessible guard page after the memory.
//!
//! ```text
//! reservation (PROT_NONE): |......size + align......|
//! after placement:               |== memory ==|guard|
//!                                ^ aligned          (the rest is unmapped)
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::mm::{self, MapFlags, ProtFlags};

use crate::units::{Bytes, FileOffset, MemoryOffset, PAGE_SIZE, to_usize};

mod advice;

pub use advice::{Advice, NumaMode};

/// Access permissions of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `PROT_READ`
    Read,
    /// `PROT_READ | PROT_WRITE`
    ReadWrite,
}

/// Visibility of writes to a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// `MAP_PRIVATE`: writes are visible to this process only (copy-on-write).
    Private,
    /// `MAP_SHARED`: writes are visible to all processes that map the file, and go to the file.
    Shared,
}

/// Parameters of a new mapping.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Length in bytes, a multiple of the page size.
    pub length: Bytes,
    /// Alignment of the first byte in bytes: a power of two, at least the page size.
    pub align: Bytes,
    /// The file and the offset where the mapping starts; `None` for anonymous memory.
    pub file: Option<(BorrowedFd<'a>, FileOffset)>,
    /// Access permissions.
    pub protection: Protection,
    /// Visibility of writes.
    pub sharing: Sharing,
    /// If false, `MAP_NORESERVE`: nothing is charged to `Committed_AS`.
    pub reserve: bool,
    /// `MAP_SYNC`; only with [`Sharing::Shared`].
    pub sync: bool,
}

impl<'a> Request<'a> {
    /// Requests a private read-only mapping of the first `length` bytes of a file.
    pub fn view(file: BorrowedFd<'a>, length: Bytes) -> Request<'a> {
        Request {
            length,
            align: Bytes::new(PAGE_SIZE),
            file: Some((file, FileOffset::new(0))),
            protection: Protection::Read,
            sharing: Sharing::Private,
            reserve: true,
            sync: false,
        }
    }
}

/// An owned mapping. Dropping the value unmaps the memory and the guard page.
///
/// Invariant: from construction to drop, this value owns the mapping `address .. address + length` and the reservation
/// of `guard` bytes after it; no other code of this crate maps or unmaps these addresses.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    length: usize,
    guard: usize,
    protection: Protection,
    sharing: Sharing,
    /// True if `MAP_SYNC` was requested and the file system supports it.
    sync: bool,
}

/// A reserved address range that is not yet a [`Mapping`]. Dropping the value unmaps the range.
struct Reservation {
    address: usize,
    length: usize,
}

impl Reservation {
    fn new(length: usize) -> io::Result<Reservation> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses overlaps no memory in use.
        let address = unsafe { mm::mmap_anonymous(ptr::null_mut(), length, ProtFlags::empty(), flags)? };
        Ok(Reservation { address: address as usize, length })
    }

    /// Unmaps everything outside `keep`, which must lie inside the reservation.
    fn trim(&mut self, keep: Range<usize>) {
        let end = self.address + self.length;
        debug_assert!(self.address <= keep.start && keep.end <= end);
        for (from, to) in [(self.address, keep.start), (keep.end, end)] {
            if to > from {
                // SAFETY: the range lies in the reservation that this value owns, and no pointer into it exists.
                let _ = unsafe { mm::munmap(from as *mut _, to - from) };
            }
        }
        self.address = keep.start;
        self.length = keep.end - keep.start;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: the reservation is owned by this value, and no pointer into it exists.
            let _ = unsafe { mm::munmap(self.address as *mut _, self.length) };
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl Mapping {
    /// Creates the mapping. On failure nothing stays mapped.
    ///
    /// # Errors
    /// Returns `InvalidInput` if the length is zero or not a multiple of the page size, or if the alignment is not a
    /// power of two or smaller than a page. Returns an error if mmap(2) fails.
    pub fn new(request: &Request<'_>) -> io::Result<Mapping> {
        let page = to_usize(PAGE_SIZE);
        let length = request.length.as_usize();
        let align = request.align.as_usize();
        if length == 0 || !length.is_multiple_of(page) {
            return Err(invalid("invalid mapping length: not a positive multiple of the page size"));
        }
        if !align.is_power_of_two() || align < page {
            return Err(invalid("invalid mapping alignment: not a power of two, or smaller than a page"));
        }
        let total = length.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut reservation = Reservation::new(total)?;
        let address = reservation.address.next_multiple_of(align);
        let (protection, sync) = (request.protection, Self::place(request, address, length)?);
        // At least one page is left for the guard: both addresses are page-aligned, so the alignment skipped at most
        // `align - page` of the `align` spare bytes.
        reservation.trim(address..address + length + page);
        std::mem::forget(reservation);
        Ok(Mapping { address, length, guard: page, protection, sharing: request.sharing, sync })
    }

    /// Maps the memory over the reservation. Returns true if the mapping has `MAP_SYNC`.
    fn place(request: &Request<'_>, address: usize, length: usize) -> io::Result<bool> {
        let mut protection = ProtFlags::READ;
        if request.protection == Protection::ReadWrite {
            protection |= ProtFlags::WRITE;
        }
        let mut flags = MapFlags::FIXED;
        if !request.reserve {
            flags |= MapFlags::NORESERVE;
        }
        let shared = request.sharing == Sharing::Shared;
        let without_sync = flags | if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let map = |flags: MapFlags| -> io::Result<()> {
            let at = address as *mut _;
            match request.file {
                Some((fd, offset)) => {
                    // SAFETY: MAP_FIXED replaces only pages of the reservation that the caller owns; no reference into
                    // it exists. The memory is only returned as a raw pointer.
                    unsafe { mm::mmap(at, length, protection, flags, fd, offset.get())? };
                }
                None => {
                    // SAFETY: same as above.
                    unsafe { mm::mmap_anonymous(at, length, protection, flags)? };
                }
            }
            Ok(())
        };
        if request.sync && shared {
            match map(flags | MapFlags::SHARED_VALIDATE | MapFlags::SYNC) {
                Ok(()) => return Ok(true),
                // Like QEMU: fall back to a mapping without MAP_SYNC after any error.
                Err(_) => return map(without_sync).map(|()| false),
            }
        }
        map(without_sync).map(|()| false)
    }

    /// Maps private anonymous memory over a part of a private writable mapping, given as byte offsets. The part is then
    /// zero. `reserve` has the same meaning as in the request.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a part that is not page-aligned or outside of the mapping, or if the mapping is
    /// shared or read-only. Returns an error if mmap(2) fails; nothing may be mapped at the part then.
    pub fn map_zeros(&mut self, part: Range<u64>, reserve: bool) -> io::Result<()> {
        let is_aligned = part.start.is_multiple_of(PAGE_SIZE) && part.end.is_multiple_of(PAGE_SIZE);
        let length = part.end.checked_sub(part.start).filter(|length| is_aligned && *length > 0);
        let length = length.ok_or_else(|| invalid("part is empty or not page-aligned"))?;
        if (self.protection, self.sharing) != (Protection::ReadWrite, Sharing::Private) {
            return Err(invalid("mapping is shared or read-only"));
        }
        let at = self.inside(MemoryOffset::new(part.start), to_usize(length))?;
        let mut flags = MapFlags::FIXED | MapFlags::PRIVATE;
        if !reserve {
            flags |= MapFlags::NORESERVE;
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: MAP_FIXED replaces only pages of this mapping, which the caller borrows mutably; no reference into it
        // exists.
        unsafe { mm::mmap_anonymous(at as *mut _, to_usize(length), protection, flags)? };
        Ok(())
    }

    /// Returns a pointer to the first byte, valid while this value lives. Dereferencing it is unsafe.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Returns the address of the first byte.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Returns the address range of the memory without the guard page.
    pub fn range(&self) -> Range<u64> {
        self.address as u64..(self.address + self.length) as u64
    }

    /// Returns the length in bytes without the guard page.
    pub fn len(&self) -> Bytes {
        Bytes::new(self.length as u64)
    }

    /// Returns false: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the access permissions.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// Returns the visibility of writes.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// Returns true if the mapping has `MAP_SYNC`.
    pub fn is_sync(&self) -> bool {
        self.sync
    }

    /// Returns the address of `length` bytes at `offset`, or `InvalidInput` if they exceed the mapping.
    pub(super) fn inside(&self, offset: MemoryOffset, length: usize) -> io::Result<usize> {
        let end = offset.as_usize().checked_add(length);
        match end {
            Some(end) if end <= self.length => Ok(self.address + offset.as_usize()),
            _ => Err(invalid("range is outside of the mapping")),
        }
    }

    /// Copies memory into a buffer. A page that would raise SIGBUS or SIGSEGV on a load (a damaged page, a file that
    /// was truncated) is an error instead.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a range outside of the mapping, and `EFAULT` if the memory cannot be read.
    pub fn read(&self, offset: MemoryOffset, out: &mut [u8]) -> io::Result<()> {
        let from = self.inside(offset, out.len())?;
        for (n, out) in out.chunks_mut(MAX_COPY).enumerate() {
            let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
            let remote = libc::iovec { iov_base: (from + n * MAX_COPY) as *mut _, iov_len: out.len() };
            // SAFETY: `local` covers exactly `out`, which is borrowed mutably; the kernel checks `remote` and only
            // reads it.
            let done = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
            check_copied(done, out.len())?;
        }
        Ok(())
    }

    /// Copies bytes into memory, as stores of a guest would. Read-only memory, which would raise a signal on a store,
    /// is an error instead.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a range outside of the mapping, and `EFAULT` if the memory cannot be written.
    pub fn write(&self, offset: MemoryOffset, bytes: &[u8]) -> io::Result<()> {
        let to = self.inside(offset, bytes.len())?;
        for (n, bytes) in bytes.chunks(MAX_COPY).enumerate() {
            let local = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
            let remote = libc::iovec { iov_base: (to + n * MAX_COPY) as *mut _, iov_len: bytes.len() };
            // SAFETY: `local` covers exactly `bytes`, which is only read; `remote` lies inside this mapping, into which
            // no reference exists.
            let done = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
            check_copied(done, bytes.len())?;
        }
        Ok(())
    }

    /// Executes one load instruction. If the page is not available, the process receives the signal that a VMM would
    /// receive (SIGBUS).
    ///
    /// # Errors
    /// Returns `InvalidInput` for an offset outside of the mapping.
    pub fn load(&self, offset: MemoryOffset) -> io::Result<u8> {
        let at = self.inside(offset, 1)?;
        // SAFETY: the byte lies inside this mapping, which has PROT_READ during its whole life.
        Ok(unsafe { ptr::read_volatile(at as *const u8) })
    }

    /// Executes one store instruction. On read-only memory the process receives SIGSEGV, as a VMM would.
    ///
    /// # Errors
    /// Returns `InvalidInput` for an offset outside of the mapping.
    pub fn store(&self, offset: MemoryOffset, value: u8) -> io::Result<()> {
        let at = self.inside(offset, 1)?;
        // SAFETY: the byte lies inside this mapping, into which no reference exists; without PROT_WRITE the store
        // raises a signal and changes nothing.
        unsafe { ptr::write_volatile(at as *mut u8, value) };
        Ok(())
    }

    /// Calls madvise(2) for a part of the mapping, given as byte offsets.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a range outside of the mapping, and an error if madvise(2) fails.
    pub fn advise(&self, part: Range<u64>, advice: Advice) -> io::Result<()> {
        let length =
            part.end.checked_sub(part.start).ok_or_else(|| invalid("range ends before its start"))?;
        let at = self.inside(MemoryOffset::new(part.start), to_usize(length))?;
        // SAFETY: the range lies inside this mapping, into which no reference exists; no advice unmaps it.
        let done = unsafe { libc::madvise(at as *mut _, to_usize(length), advice.number()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Calls madvise(2) for the whole mapping.
    ///
    /// # Errors
    /// Returns an error if madvise(2) fails.
    pub fn advise_all(&self, advice: Advice) -> io::Result<()> {
        self.advise(0..self.length as u64, advice)
    }

    /// Reads a part of the mapping, given as byte offsets, and keeps its pages in memory until the mapping is dropped
    /// (mlock(2)).
    ///
    /// # Errors
    /// Returns `InvalidInput` for a range outside of the mapping, `ENOMEM` beyond `RLIMIT_MEMLOCK`, and `EAGAIN` or
    /// `ENOMEM` if a page cannot be read.
    pub fn lock(&self, part: Range<u64>) -> io::Result<()> {
        let length =
            part.end.checked_sub(part.start).ok_or_else(|| invalid("range ends before its start"))?;
        let at = self.inside(MemoryOffset::new(part.start), to_usize(length))?;
        // SAFETY: the range lies inside this mapping; mlock changes no byte.
        unsafe { mm::mlock(at as *mut _, to_usize(length)) }.map_err(io::Error::from)
    }

    /// Binds the memory to NUMA nodes (mbind(2) with `MPOL_MF_STRICT`).
    ///
    /// # Errors
    /// Returns an error if mbind(2) fails.
    pub fn bind(&self, mode: NumaMode, nodes: &[u16]) -> io::Result<()> {
        const BITS: usize = u64::BITS as usize;
        const STRICT: libc::c_long = 1;
        let last = nodes.iter().copied().max();
        // The kernel reads `maxnode - 1` bits of the mask, so 1 stands for an empty mask.
        let maxnode = last.map_or(1, |n| usize::from(n) + 2);
        let mut mask = vec![0u64; maxnode.div_ceil(BITS) + 1];
        for &node in nodes {
            mask[usize::from(node) / BITS] |= 1 << (usize::from(node) % BITS);
        }
        let bits = if last.is_some() { mask.as_ptr() } else { ptr::null() };
        // SAFETY: the range is this mapping; `mask` has more than `maxnode` bits and outlives the call.
        let done = unsafe {
            libc::syscall(libc::SYS_mbind, self.address, self.length, mode.number(), bits, maxnode, STRICT)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: memory and guard page belong to this value, which is not used after the call.
        let _ = unsafe { mm::munmap(self.address as *mut _, self.length + self.guard) };
    }
}

/// Maximum number of bytes per system call. The kernel's own limit is just below 2 GiB.
const MAX_COPY: usize = 1 << 30;

fn check_copied(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == wanted => Ok(()),
        // A partial copy stopped at an inaccessible page.
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
