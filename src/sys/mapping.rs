//! One owned mapping, placed as QEMU places guest memory: an inaccessible reservation, the memory
//! inside it at the wished alignment, one inaccessible guard page behind it.
//!
//! ```text
//! reserved PROT_NONE:  |......size + align......|
//! after placing:             |== memory ==|guard|
//!                            ^ aligned          (the rest is given back)
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::mm::{self, MapFlags, MprotectFlags, ProtFlags};

use crate::units::{Bytes, FileOffset, MemoryOffset, PAGE_SIZE};

mod advice;

pub use advice::{Advice, NumaMode};

/// What the memory may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// `PROT_READ`
    Read,
    /// `PROT_READ | PROT_WRITE`
    ReadWrite,
}

/// Who sees a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// `MAP_PRIVATE`: this process; the page is copied.
    Private,
    /// `MAP_SHARED`: everybody who maps the file, and the file.
    Shared,
}

/// A mapping to be made.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Bytes to map, whole pages.
    pub length: Bytes,
    /// Alignment of the first byte: a power of two, at least a page.
    pub align: Bytes,
    /// The file and where in it the mapping begins; anonymous memory without.
    pub file: Option<(BorrowedFd<'a>, FileOffset)>,
    /// What the memory may be used for.
    pub protection: Protection,
    /// Who sees a write.
    pub sharing: Sharing,
    /// False: `MAP_NORESERVE`, nothing is charged to `Committed_AS`.
    pub reserve: bool,
    /// `MAP_SYNC`; only with [`Sharing::Shared`].
    pub sync: bool,
}

impl<'a> Request<'a> {
    /// The first `length` bytes of a file, to be read, private.
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

/// Owned memory; unmapped, guard page included, when dropped.
///
/// Invariant: `address .. address + length` is mapped by this value, and the `guard` bytes after it
/// are reserved by it, from construction to drop; nothing else in this crate maps or unmaps there.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    length: usize,
    guard: usize,
    protection: Protection,
    sharing: Sharing,
    /// True when `MAP_SYNC` was asked for and the filesystem could give it.
    sync: bool,
}

/// A part of the address space that is not yet a [`Mapping`]; given back when dropped.
struct Reservation {
    address: usize,
    length: usize,
}

impl Reservation {
    fn new(length: usize) -> io::Result<Reservation> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
        let address = unsafe { mm::mmap_anonymous(ptr::null_mut(), length, ProtFlags::empty(), flags)? };
        Ok(Reservation { address: address as usize, length })
    }

    /// Gives back everything outside `keep`, which lies inside.
    fn trim(&mut self, keep: Range<usize>) {
        let end = self.address + self.length;
        debug_assert!(self.address <= keep.start && keep.end <= end);
        for (from, to) in [(self.address, keep.start), (keep.end, end)] {
            if to > from {
                // SAFETY: the range lies in the reservation that this value owns, and nobody points into it.
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
            // SAFETY: the reservation is owned by this value, and nobody points into it.
            let _ = unsafe { mm::munmap(self.address as *mut _, self.length) };
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl Mapping {
    /// Makes the mapping.
    ///
    /// # Errors
    /// The error of `mmap`; `InvalidInput` when the length is no whole number of pages or the
    /// alignment no power of two ≥ a page. Nothing stays mapped.
    pub fn new(request: &Request<'_>) -> io::Result<Mapping> {
        let page = PAGE_SIZE as usize;
        let length = request.length.as_usize();
        let align = request.align.as_usize();
        if length == 0 || !length.is_multiple_of(page) {
            return Err(invalid("the length of a mapping is a whole number of pages"));
        }
        if !align.is_power_of_two() || align < page {
            return Err(invalid("the alignment of a mapping is a power of two, at least a page"));
        }
        let total = length.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut reservation = Reservation::new(total)?;
        let address = reservation.address.next_multiple_of(align);
        let (protection, sync) = (request.protection, Self::place(request, address, length)?);
        // At least one page is left behind the memory: both addresses are whole pages, so aligning
        // skipped at most `align - page` of the `align` spare bytes.
        reservation.trim(address..address + length + page);
        std::mem::forget(reservation);
        Ok(Mapping { address, length, guard: page, protection, sharing: request.sharing, sync })
    }

    /// Maps over the reservation; says whether MAP_SYNC was had.
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
        let plain = flags | if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let map = |flags: MapFlags| -> io::Result<()> {
            let at = address as *mut _;
            match request.file {
                Some((fd, offset)) => {
                    // SAFETY: MAP_FIXED replaces only pages of the reservation that the caller owns;
                    // no reference into it exists. The memory is only handed out as a raw pointer.
                    unsafe { mm::mmap(at, length, protection, flags, fd, offset.get())? };
                }
                None => {
                    // SAFETY: as above.
                    unsafe { mm::mmap_anonymous(at, length, protection, flags)? };
                }
            }
            Ok(())
        };
        if request.sync && shared {
            match map(flags | MapFlags::SHARED_VALIDATE | MapFlags::SYNC) {
                Ok(()) => return Ok(true),
                // As QEMU: whatever the reason, try again without.
                Err(_) => return map(plain).map(|()| false),
            }
        }
        map(plain).map(|()| false)
    }

    /// First byte. Dereferencing it is unsafe and the caller's affair; it is valid while this value lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Addresses of the memory, without the guard page.
    pub fn range(&self) -> Range<u64> {
        self.address as u64..(self.address + self.length) as u64
    }

    /// Bytes of memory, without the guard page.
    pub fn len(&self) -> Bytes {
        Bytes::new(self.length as u64)
    }

    /// Never: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// What the memory may be used for.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// Who sees a write.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// True when the mapping has `MAP_SYNC`.
    pub fn is_sync(&self) -> bool {
        self.sync
    }

    /// The address of `length` bytes from `offset`, when they lie inside.
    fn inside(&self, offset: MemoryOffset, length: usize) -> io::Result<usize> {
        let end = offset.as_usize().checked_add(length);
        match end {
            Some(end) if end <= self.length => Ok(self.address + offset.as_usize()),
            _ => Err(invalid("outside of the mapping")),
        }
    }

    /// Copies memory out. What a load would answer with SIGBUS or SIGSEGV (a damaged page, a file
    /// that shrank) is an error here.
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping; `EFAULT` where the memory cannot be read.
    pub fn read(&self, offset: MemoryOffset, out: &mut [u8]) -> io::Result<()> {
        let from = self.inside(offset, out.len())?;
        for (n, out) in out.chunks_mut(MAX_COPY).enumerate() {
            let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
            let remote = libc::iovec { iov_base: (from + n * MAX_COPY) as *mut _, iov_len: out.len() };
            // SAFETY: `local` covers exactly `out`, which is borrowed mutably; the kernel checks
            // `remote`, which is read only.
            let done = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
            whole(done, out.len())?;
        }
        Ok(())
    }

    /// Copies bytes into memory, as a guest's stores would. What a store would answer with a signal
    /// (read-only memory) is an error here.
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping; `EFAULT` where the memory cannot be written.
    pub fn write(&self, offset: MemoryOffset, bytes: &[u8]) -> io::Result<()> {
        let to = self.inside(offset, bytes.len())?;
        for (n, bytes) in bytes.chunks(MAX_COPY).enumerate() {
            let local = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
            let remote = libc::iovec { iov_base: (to + n * MAX_COPY) as *mut _, iov_len: bytes.len() };
            // SAFETY: `local` covers exactly `bytes`, which is only read; `remote` lies inside this
            // mapping, into which no reference exists.
            let done = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
            whole(done, bytes.len())?;
        }
        Ok(())
    }

    /// One load instruction. Where the page cannot be had, the process gets the signal that a VMM
    /// would get (SIGBUS).
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping.
    pub fn load(&self, offset: MemoryOffset) -> io::Result<u8> {
        let at = self.inside(offset, 1)?;
        // SAFETY: the byte lies inside this mapping, which has PROT_READ while it lives.
        Ok(unsafe { ptr::read_volatile(at as *const u8) })
    }

    /// One store instruction. On read-only memory the process gets SIGSEGV, as a VMM would.
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping.
    pub fn store(&self, offset: MemoryOffset, value: u8) -> io::Result<()> {
        let at = self.inside(offset, 1)?;
        // SAFETY: the byte lies inside this mapping, into which no reference exists; without
        // PROT_WRITE the store ends in a signal and changes nothing.
        unsafe { ptr::write_volatile(at as *mut u8, value) };
        Ok(())
    }

    /// Gives advice about a part of the mapping.
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping; the error of `madvise`.
    pub fn advise(&self, part: Range<u64>, advice: Advice) -> io::Result<()> {
        let length =
            part.end.checked_sub(part.start).ok_or_else(|| invalid("a range that ends before it starts"))?;
        let at = self.inside(MemoryOffset::new(part.start), length as usize)?;
        // SAFETY: the range lies inside this mapping, into which no reference exists; none of the
        // advices unmaps it.
        let done = unsafe { libc::madvise(at as *mut _, length as usize, advice.number()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Gives advice about the whole mapping.
    ///
    /// # Errors
    /// The error of `madvise`.
    pub fn advise_all(&self, advice: Advice) -> io::Result<()> {
        self.advise(0..self.length as u64, advice)
    }

    /// Binds the memory to NUMA nodes (`mbind` with `MPOL_MF_STRICT`).
    ///
    /// # Errors
    /// The error of `mbind`.
    pub fn bind(&self, mode: NumaMode, nodes: &[u16]) -> io::Result<()> {
        const BITS: usize = u64::BITS as usize;
        const STRICT: libc::c_long = 1;
        let last = nodes.iter().copied().max();
        // The kernel looks at `maxnode - 1` bits; no bits at all without nodes.
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

    /// Takes away all access to a part (`PROT_NONE`); what lay there stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` outside of the mapping; the error of `mprotect`.
    pub fn forbid(&self, part: Range<u64>) -> io::Result<()> {
        let length =
            part.end.checked_sub(part.start).ok_or_else(|| invalid("a range that ends before it starts"))?;
        let at = self.inside(MemoryOffset::new(part.start), length as usize)?;
        // SAFETY: the range lies inside this mapping, into which no reference exists.
        unsafe { mm::mprotect(at as *mut _, length as usize, MprotectFlags::empty())? };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: memory and guard page belong to this value, and it is gone after this.
        let _ = unsafe { mm::munmap(self.address as *mut _, self.length + self.guard) };
    }
}

/// Bytes that one system call copies at most; the kernel's own limit is just below 2 GiB.
const MAX_COPY: usize = 1 << 30;

fn whole(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == wanted => Ok(()),
        // A partial copy stopped at a page that cannot be had.
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
