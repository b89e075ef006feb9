//! Anonymous files that several processes share: the counters, the table of requests in flight, and backings that live
//! in memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MlockFlags, ProtFlags};
use rustix::thread::futex;

use crate::units::{Bytes, PAGE_SIZE};

/// A new memfd of that length that can be sealed.
///
/// # Errors
/// The system's.
pub fn create(name: &str, length: Bytes) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, length.get())?;
    Ok(fd)
}

/// Makes a memfd immutable for good, for every descriptor of it.
///
/// # Errors
/// `EBUSY` while a writable shared mapping of it exists.
pub fn freeze(fd: impl AsFd) -> io::Result<()> {
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    Ok(fcntl_add_seals(fd, all)?)
}

/// Whole pages of 64-bit numbers that several processes share.
#[derive(Debug)]
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    length: usize,
    fd: OwnedFd,
}

// SAFETY: the pages are only ever reached as atomics, and stay mapped as long as the value lives.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// New pages, all zero, to write in.
    ///
    /// # Errors
    /// The system's.
    pub fn create(name: &str, pages: usize) -> io::Result<SharedWords> {
        let fd = create(name, Bytes::new(pages as u64 * PAGE_SIZE))?;
        // Nobody who is handed the descriptor can cut the pages away under the others.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd, pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// The pages behind a descriptor that [`create`](Self::create) made in another process, to write in too.
    ///
    /// # Errors
    /// The system's, or `InvalidInput` for a file that could shrink or has another length.
    pub fn share(fd: OwnedFd, pages: usize) -> io::Result<SharedWords> {
        Self::map(fd, pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// The same, to look at. A store to one of these words would be the death of the process.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub fn watch(fd: OwnedFd, pages: usize) -> io::Result<SharedWords> {
        Self::map(fd, pages, ProtFlags::READ)
    }

    fn map(fd: OwnedFd, pages: usize, protection: ProtFlags) -> io::Result<SharedWords> {
        let length = pages * PAGE_SIZE as usize;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if rustix::fs::fstat(&fd)?.st_size != length as i64 || !seals.contains(SealFlags::SHRINK) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. The file is that long
        // and sealed against shrinking, so no access can fault.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(SharedWords { base, length, fd })
    }

    /// All of them.
    pub fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is `length` bytes, page-aligned, zeroed at first and only ever written as atomics by
        // every process that has it; it lives as long as `self`. Where it is read-only, loads of 64 bits are plain
        // loads, and nobody stores.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length / 8) }
    }

    /// To hand to another process.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// A page of 64-bit numbers that several processes count in, and a bell that one of them rings for the others.
#[derive(Debug)]
pub struct SharedCounters(SharedWords);

impl SharedCounters {
    /// How many numbers there are. Behind them is the bell.
    pub const COUNT: usize = (PAGE_SIZE / 8) as usize - 1;

    /// A new page, all zero.
    ///
    /// # Errors
    /// The system's.
    pub fn create() -> io::Result<SharedCounters> {
        SharedWords::create("stencil-counters", 1).map(SharedCounters)
    }

    /// The page behind a descriptor that [`create`](Self::create) made in another process.
    ///
    /// # Errors
    /// The system's, or `InvalidInput` for a file that could shrink or is no page long.
    pub fn map(fd: OwnedFd) -> io::Result<SharedCounters> {
        SharedWords::share(fd, 1).map(SharedCounters)
    }

    /// All of them.
    pub fn all(&self) -> &[AtomicU64] {
        &self.0.all()[..Self::COUNT]
    }

    /// To hand to another process.
    pub fn fd(&self) -> &OwnedFd {
        self.0.fd()
    }

    fn bell(&self) -> &AtomicU32 {
        let word = std::ptr::from_ref(&self.0.all()[Self::COUNT]);
        // SAFETY: four bytes at the begin of an aligned word that lives as long as `self`; no process reaches it other
        // than as this smaller atomic.
        unsafe { &*word.cast::<AtomicU32>() }
    }

    /// How often the bell was rung.
    pub fn rings(&self) -> u32 {
        self.bell().load(Ordering::SeqCst)
    }

    /// Rings the bell: whoever waits for it goes on. Gives how often it was rung.
    pub fn ring(&self) -> u32 {
        let rings = self.bell().fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        let _ = futex::wake(self.bell(), futex::Flags::empty(), i32::MAX as u32);
        rings
    }

    /// Waits until the bell is rung, if it was not since it had been rung `heard` times; may come back early.
    pub fn wait_for_ring(&self, heard: u32) {
        let _ = futex::wait(self.bell(), futex::Flags::empty(), heard, None);
    }
}

/// Memory of this process that is always present: what leaves from it cannot fault on the way.
#[derive(Debug)]
pub struct LockedBuffer {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for LockedBuffer {}
// SAFETY: shared access is read-only.
unsafe impl Sync for LockedBuffer {}

impl LockedBuffer {
    /// That many zero bytes, in whole pages, locked.
    ///
    /// # Errors
    /// `ENOMEM` or `EPERM` where the limit of locked memory does not allow it.
    pub fn new(length: Bytes) -> io::Result<LockedBuffer> {
        let length = length.pages().bytes().as_usize().max(PAGE_SIZE as usize);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of ours.
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
        // SAFETY: the range is exactly the mapping just made. A flag of zero bits is mlock: every page is present now.
        unsafe { rustix::mm::mlock_with(buffer.base.as_ptr().cast(), length, MlockFlags::empty())? };
        Ok(buffer)
    }
}

impl std::ops::Deref for LockedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `length` readable bytes, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }
}

impl std::ops::DerefMut for LockedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for LockedBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_the_counters_are_one() {
        let a = SharedCounters::create().unwrap();
        let b = SharedCounters::map(a.fd().try_clone().unwrap()).unwrap();
        a.all()[7].fetch_add(5, Ordering::Relaxed);
        assert_eq!(b.all()[7].load(Ordering::Relaxed), 5);
        assert!(SharedCounters::map(create("short", Bytes::new(12)).unwrap()).is_err());
    }

    #[test]
    fn a_bell_wakes_who_waits_in_another_mapping() {
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
    fn who_watches_sees_what_others_write() {
        let words = SharedWords::create("x", 3).unwrap();
        let watched = SharedWords::watch(words.fd().try_clone().unwrap(), 3).unwrap();
        assert_eq!(watched.all().len(), 3 * 512);
        words.all()[1535].store(9, Ordering::Relaxed);
        assert_eq!(watched.all()[1535].load(Ordering::Relaxed), 9);
        assert!(SharedWords::watch(words.fd().try_clone().unwrap(), 2).is_err(), "another length");
        let file = std::fs::File::from(words.fd().try_clone().unwrap());
        assert!(file.set_len(4096).is_err(), "the pages cannot be cut away");
        assert!(SharedWords::watch(create("unsealed", Bytes::new(4096)).unwrap(), 1).is_err());
    }

    #[test]
    fn a_frozen_memfd_takes_no_byte() {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::from(create("x", Bytes::new(8192)).unwrap());
        file.write_all_at(b"first", 0).unwrap();
        freeze(&file).unwrap();
        assert_eq!(file.write_at(b"x", 0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(file.set_len(1).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn a_locked_buffer_is_whole_pages_of_memory() {
        let mut buffer = LockedBuffer::new(Bytes::new(5000)).unwrap();
        assert_eq!(buffer.len(), 8192);
        buffer[8191] = 7;
        assert_eq!(buffer.iter().map(|&b| u64::from(b)).sum::<u64>(), 7);
    }
}
