//! Memory that is shared between processes through memfds (counters, the table of pending requests, in-memory backing
//! files), and locked memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MlockFlags, ProtFlags};
use rustix::thread::futex;

use crate::units::{Bytes, PAGE_SIZE, to_usize};

/// Creates a sealable memfd of `length` bytes.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn create(name: &str, length: Bytes) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, length.get())?;
    Ok(fd)
}

/// Seals a memfd against all changes, through any descriptor and permanently.
///
/// # Errors
/// Returns `EBUSY` while a writable shared mapping of the memfd exists.
pub fn freeze(fd: impl AsFd) -> io::Result<()> {
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    Ok(fcntl_add_seals(fd, all)?)
}

/// Whole pages of 64-bit words that several processes share.
#[derive(Debug)]
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    length: usize,
    fd: OwnedFd,
}

// SAFETY: the pages are only accessed as atomics, and stay mapped while the value lives.
unsafe impl Send for SharedWords {}
// SAFETY: same as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Creates zeroed pages, mapped for reading and writing.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create(name: &str, pages: usize) -> io::Result<SharedWords> {
        let fd = create(name, Bytes::new(pages as u64 * PAGE_SIZE))?;
        // The seals keep a process that receives the descriptor from truncating the file under the other processes.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd, pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Maps the pages of a descriptor that [`create`](Self::create) made in another process, for reading and writing.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a file that is not sealed against shrinking or has another length, and an error if a
    /// system call fails.
    pub fn share(fd: OwnedFd, pages: usize) -> io::Result<SharedWords> {
        Self::map(fd, pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Same as [`share`](Self::share), but read-only: a store to one of the words raises SIGSEGV.
    ///
    /// # Errors
    /// Same as [`share`](Self::share).
    pub fn watch(fd: OwnedFd, pages: usize) -> io::Result<SharedWords> {
        Self::map(fd, pages, ProtFlags::READ)
    }

    fn map(fd: OwnedFd, pages: usize, protection: ProtFlags) -> io::Result<SharedWords> {
        let length = pages * to_usize(PAGE_SIZE);
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if rustix::fs::fstat(&fd)?.st_size.cast_unsigned() != length as u64
            || !seals.contains(SealFlags::SHRINK)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no memory in use. The file has this
        // length and is sealed against shrinking, so no access can fault.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(SharedWords { base, length, fd })
    }

    /// Returns all words.
    pub fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `length` bytes, is page-aligned and initially zero, and every process that maps it
        // only writes it as atomics; it lives as long as `self`. In a read-only mapping, 64-bit atomic loads are plain
        // loads, and no store is executed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length / 8) }
    }

    /// Returns the descriptor, which can be passed to another process.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: `map` created the mapping with this length, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// A page of 64-bit counters that several processes share, with a futex word (the ring) to wake waiting processes.
#[derive(Debug)]
pub struct SharedCounters(SharedWords);

impl SharedCounters {
    /// Number of counters. The ring is the word after them.
    pub const COUNT: usize = (PAGE_SIZE / 8) as usize - 1;

    /// Creates a zeroed page.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create() -> io::Result<SharedCounters> {
        SharedWords::create("stencil-counters", 1).map(SharedCounters)
    }

    /// Maps the page of a descriptor that [`create`](Self::create) made in another process.
    ///
    /// # Errors
    /// Returns `InvalidInput` for a file that is not sealed against shrinking or is not one page long, and an error if
    /// a system call fails.
    pub fn map(fd: OwnedFd) -> io::Result<SharedCounters> {
        SharedWords::share(fd, 1).map(SharedCounters)
    }

    /// Returns all counters.
    pub fn all(&self) -> &[AtomicU64] {
        &self.0.all()[..Self::COUNT]
    }

    /// Returns the descriptor, which can be passed to another process.
    pub fn fd(&self) -> &OwnedFd {
        self.0.fd()
    }

    fn word(&self) -> &AtomicU32 {
        let word = std::ptr::from_ref(&self.0.all()[Self::COUNT]);
        // SAFETY: four bytes at the start of an aligned word that lives as long as `self`; every process accesses them
        // only as an `AtomicU32`.
        unsafe { &*word.cast::<AtomicU32>() }
    }

    /// Returns the ring: how often it was incremented.
    pub fn rings(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Increments the ring, and wakes all waiting processes. Returns the new ring.
    pub fn ring(&self) -> u32 {
        let rings = self.word().fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        let _ = futex::wake(self.word(), futex::Flags::empty(), i32::MAX as u32);
        rings
    }

    /// Waits until the count of rings differs from `heard`. May return early.
    pub fn wait_for_ring(&self, heard: u32) {
        let _ = futex::wait(self.word(), futex::Flags::empty(), heard, None);
    }
}

/// Locked memory, which is always resident: a write(2) from this buffer cannot fault.
#[derive(Debug)]
pub struct LockedBuffer {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the buffer is plain memory with one owner.
unsafe impl Send for LockedBuffer {}
// SAFETY: shared access is read-only.
unsafe impl Sync for LockedBuffer {}

impl LockedBuffer {
    /// Allocates zeroed, locked memory of `length` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// Returns `ENOMEM` or `EPERM` if the limit of locked memory (`RLIMIT_MEMLOCK`) is exceeded.
    pub fn new(length: Bytes) -> io::Result<LockedBuffer> {
        let length = length.pages().bytes().as_usize().max(to_usize(PAGE_SIZE));
        // SAFETY: a new anonymous mapping at an address that the kernel chooses overlaps no memory in use.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let buffer = LockedBuffer { base, length };
        // SAFETY: the range is exactly the new mapping. Without flags mlock2 is mlock: all pages are resident
        // afterwards.
        unsafe { rustix::mm::mlock_with(buffer.base.as_ptr().cast(), length, MlockFlags::empty())? };
        Ok(buffer)
    }
}

impl std::ops::Deref for LockedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `length` readable bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }
}

impl std::ops::DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: same as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for LockedBuffer {
    fn drop(&mut self) {
        // SAFETY: `new` created the mapping with this length, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::memory::memfd::*;

    #[test]
    fn counters_are_shared_between_mappings() {
        let a = SharedCounters::create().unwrap();
        let b = SharedCounters::map(a.fd().try_clone().unwrap()).unwrap();
        a.all()[7].fetch_add(5, Ordering::Relaxed);
        assert_eq!(b.all()[7].load(Ordering::Relaxed), 5);
        assert!(SharedCounters::map(create("short", Bytes::new(12)).unwrap()).is_err());
    }

    #[test]
    fn bell_wakes_a_waiter_in_another_mapping() {
        let a = SharedCounters::create().unwrap();
        let b = SharedCounters::map(a.fd().try_clone().unwrap()).unwrap();
        assert_eq!(b.rings(), 0);
        let waiter = std::thread::spawn(move || {
            while b.rings() == 0 {
                b.wait_for_ring(0);
            }
            b.rings()
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(a.ring(), 1);
        assert_eq!(waiter.join().unwrap(), 1);
        a.wait_for_ring(0);
    }

    #[test]
    fn watch_sees_stores_of_other_mappings() {
        let words = SharedWords::create("x", 3).unwrap();
        let watched = SharedWords::watch(words.fd().try_clone().unwrap(), 3).unwrap();
        assert_eq!(watched.all().len(), 3 * 512);
        words.all()[1535].store(9, Ordering::Relaxed);
        assert_eq!(watched.all()[1535].load(Ordering::Relaxed), 9);
        assert!(SharedWords::watch(words.fd().try_clone().unwrap(), 2).is_err(), "wrong length");
        let file = std::fs::File::from(words.fd().try_clone().unwrap());
        assert!(file.set_len(4096).is_err(), "the file is sealed against shrinking");
        assert!(SharedWords::watch(create("unsealed", Bytes::new(4096)).unwrap(), 1).is_err());
    }

    #[test]
    fn frozen_memfd_rejects_writes() {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(create("x", Bytes::new(8192)).unwrap());
        file.write_all_at(b"first", 0).unwrap();
        freeze(&file).unwrap();
        assert_eq!(file.write_at(b"x", 0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(file.set_len(1).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn locked_buffer_is_rounded_up_to_pages() {
        let mut buffer = LockedBuffer::new(Bytes::new(5000)).unwrap();
        assert_eq!(buffer.len(), 8192);
        buffer[8191] = 7;
        assert_eq!(buffer.iter().map(|&b| u64::from(b)).sum::<u64>(), 7);
    }
}
