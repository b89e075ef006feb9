//! A memory backend: executes a plan by opening the file and mapping the memory. A backend is immutable.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result, errno_text};
use crate::sys::memory::mapping::{Advice, Mapping, Protection, Request, Sharing};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::memory::userfault;
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE, PageIndex, to_usize};

use super::dirty::{PageRange, page_ranges};
use super::file::{self, Undo};
use super::note::Note;
use super::options::Options;
use super::plan::{FileFacts, Layout, Plan, Source, map_failed};
use super::row::Role;
use super::zeros::zero_runs_of;

#[cfg(feature = "rust-vmm")]
mod guest_region;

/// A mapped memory object. Cloning the value creates another handle to the same memory. The last handle unmaps the
/// memory when it is dropped, so a VMM keeps a handle in each memory region that it creates from the backend.
///
/// ```
/// use stencilfs::memory::Backend;
/// use stencilfs::units::MemoryOffset;
///
/// # fn main() -> stencilfs::error::Result<()> {
/// # let template = tempfile::NamedTempFile::new().unwrap();
/// # std::fs::write(template.path(), vec![7; 1 << 20]).unwrap();
/// # let path = template.path();
/// let memory = Backend::template(path)?;
/// memory.write_at(MemoryOffset::new(5000), b"first write")?;
/// memory.write_at(MemoryOffset::new(5100), b"same page")?;
/// let dirty = memory.dirty()?;
/// assert_eq!(dirty.len(), 1);
/// assert_eq!(dirty[0].pages(), 1..2);
/// assert_eq!(std::fs::read(path).unwrap()[5000], 7, "the file is unchanged");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Backend(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mapping: Arc<Mapping>,
    file: Option<Arc<File>>,
    plan: Plan,
    notes: Vec<Note>,
    /// The registration for write tracking, if there is one.
    tracking: Mutex<Option<OwnedFd>>,
    /// Unlinks a file that a trial created. Dropped after the mapping.
    _undo: Undo,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.plan.discard {
            // Like QEMU, errors are ignored; the notes of the plan report when the option has no effect.
            let _ = self.mapping.advise_all(Advice::Remove);
        }
    }
}

impl Backend {
    /// Maps a whole file copy-on-write: opens it read-only, and reserves no memory for the copies. Long runs of zeros
    /// of a file on a Stencil mount are anonymous memory in the same address range. To map the file alone, use
    /// `anonymous-zeros=off` of [`Backend::from_text`].
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the file does not exist, and an error if the file
    /// cannot be mapped.
    pub fn template(path: impl AsRef<Path>) -> Result<Backend> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| Error::io("cannot map", path, e))?;
        let text = "memory-backend-file,id=memory,size=4k,mem-path=/,readonly=on,rom=off,reserve=off";
        let mut options = Options::parse(text)?;
        options.size = Bytes::new(metadata.len());
        if let Some(file) = &mut options.file {
            file.mem_path = path.to_owned();
        }
        Backend::create(&options.plan()?)
    }

    /// Opens and maps the object that an option string or JSON text describes.
    ///
    /// # Errors
    /// Returns an error with QEMU's text for everything that QEMU rejects, and Stencil's own errors.
    pub fn from_text(text: &str) -> Result<Backend> {
        Backend::create(&Options::parse(text)?.plan()?)
    }

    /// Executes a plan. On failure nothing stays mapped, and a created file is removed.
    ///
    /// # Errors
    /// Returns an error with QEMU's text for everything that QEMU rejects, and Stencil's own errors.
    pub fn create(plan: &Plan) -> Result<Backend> {
        Backend::make(plan.clone(), false, None)
    }

    /// Same as [`Backend::create`], for a caller that knows the zero runs of the template's file.
    ///
    /// # Errors
    /// Same as [`Backend::create`].
    #[cfg(feature = "internals")]
    #[doc(hidden)]
    pub fn create_with_zeros(plan: &Plan, runs: &[Range<u64>]) -> Result<Backend> {
        Backend::make(plan.clone(), false, Some(runs))
    }

    /// Executes a plan to inspect the result. When the last handle is dropped, the file is in its previous state,
    /// unless the caller wrote to it through a shared mapping.
    ///
    /// # Errors
    /// Same as [`Backend::create`].
    pub fn trial(plan: &Plan) -> Result<Backend> {
        Backend::make(plan.for_trial(), true, None)
    }

    fn make(mut plan: Plan, trial: bool, zeros: Option<&[Range<u64>]>) -> Result<Backend> {
        let (opened, offset) = match &plan.source {
            Source::File { path, open, offset } => (Some(file::open(&plan, path, *open)?), *offset),
            Source::Anonymous | Source::Memfd => (None, FileOffset::new(0)),
        };
        let facts = opened.as_ref().map_or(FileFacts::NONE, |o| o.facts);
        let layout = plan.layout(&facts)?;
        let refused = plan.check_mapped(&facts).err();
        let created = opened.as_ref().is_some_and(|o| o.undo.is_armed());
        let extend_to = layout.extend_to.filter(|_| refused.is_none());
        let not_extended = match (extend_to, &opened) {
            // A trial maps an existing empty file but touches no page, because other processes may use the file.
            (Some(_), Some(_)) if trial && !created => {
                plan.leave_untouched();
                None
            }
            (Some(length), Some(opened)) => {
                opened.file.set_len(length).err().map(|cause| cannot_extend(&plan, length, cause))
            }
            _ => None,
        };
        let fuse = opened.as_ref().is_some_and(|o| o.fuse);
        let (file, mut undo) = match (opened, &plan.source) {
            (Some(opened), _) => (Some(opened.file), opened.undo),
            (None, Source::Memfd) => (Some(new_memfd(&plan.region, layout.length)?), Undo::default()),
            (None, _) => (None, Undo::default()),
        };
        let mut mapping = map(&plan, &layout, file.as_ref(), offset)?;
        // QEMU's order: a mapping error takes precedence over all other errors.
        if let Some(error) = not_extended.or(refused) {
            return Err(error);
        }
        let mut notes = plan.notes.clone();
        if let (true, false, Source::File { path, .. }) = (plan.sync, mapping.is_sync(), &plan.source) {
            notes.push(Note::no_sync(path));
        }
        let runs = match (plan.anonymous_zeros, zeros, &file) {
            (false, ..) | (true, None, None) => Vec::new(),
            (true, Some(runs), _) => runs.to_vec(),
            // Zero runs are searched only in a file on a Stencil mount, which never changes. A page of another file
            // would show later writes to the file, but anonymous memory would not.
            (true, None, Some(file)) if fuse && file::is_on_stencil_mount(file) => {
                // If lseek(2) fails, all pages are pages of the file.
                zero_runs_of(file, offset, layout.length.get()).unwrap_or_default()
            }
            (true, None, Some(_)) => Vec::new(),
        };
        runs.iter().try_for_each(|run| mapping.map_zeros(run.clone(), plan.reserve)).map_err(map_failed)?;
        advise(&plan, &mapping, fuse, &mut notes)?;
        for run in runs {
            // A write would otherwise allocate 2 MiB, all of which counts as copied. Fails on a kernel without huge
            // pages.
            let _ = mapping.advise(run, Advice::NoHugePage);
        }
        fill(&plan, &mapping)?;
        if !trial {
            undo.disarm();
        }
        let (mapping, file) = (Arc::new(mapping), file.map(Arc::new));
        Ok(Backend(Arc::new(Inner { mapping, file, plan, notes, tracking: Mutex::default(), _undo: undo })))
    }

    /// Returns the size of the memory.
    pub fn len(&self) -> Bytes {
        self.0.mapping.len()
    }

    /// Returns false: a backend has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns a pointer to the first byte, valid while any handle lives. Dereferencing it is unsafe.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.mapping.as_ptr()
    }

    /// Returns the address range of the memory in this process.
    pub fn address_range(&self) -> std::ops::Range<u64> {
        self.0.mapping.range()
    }

    /// Returns the open file of the memory, or `None` for anonymous memory.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.file.as_deref().map(AsFd::as_fd)
    }

    /// Returns the offset in the file where the memory starts.
    pub fn file_offset(&self) -> FileOffset {
        match self.0.plan.source {
            Source::File { offset, .. } => offset,
            Source::Anonymous | Source::Memfd => FileOffset::new(0),
        }
    }

    /// Returns the access permissions of the mapping.
    pub fn protection(&self) -> Protection {
        self.0.mapping.protection()
    }

    /// Returns the visibility of writes.
    pub fn sharing(&self) -> Sharing {
        self.0.mapping.sharing()
    }

    /// Returns the mmap(2) flags of the mapping without `MAP_FIXED`, as a VMM passes them to other components.
    pub fn flags(&self) -> i32 {
        let mut flags = match self.sharing() {
            Sharing::Private => libc::MAP_PRIVATE,
            Sharing::Shared if self.0.mapping.is_sync() => libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
            Sharing::Shared => libc::MAP_SHARED,
        };
        if self.0.file.is_none() {
            flags |= libc::MAP_ANONYMOUS;
        }
        if !self.0.plan.reserve {
            flags |= libc::MAP_NORESERVE;
        }
        flags
    }

    /// Returns the role of the memory for the guest.
    pub fn role(&self) -> Role {
        self.0.plan.role
    }

    /// Returns the executed plan.
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// Returns notes for the user.
    pub fn notes(&self) -> &[Note] {
        &self.0.notes
    }

    /// Copies memory into a buffer. A page that would raise SIGBUS in a guest (a damaged page, a file that was
    /// truncated) is an error instead.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for a range outside of the memory, and
    /// [`Code::Failed`](crate::error::Code::Failed) if a page is not available.
    pub fn read_at(&self, at: MemoryOffset, out: &mut [u8]) -> Result<()> {
        self.0.mapping.read(at, out).map_err(|e| self.refused("read", at, out.len(), &e))
    }

    /// Copies bytes into memory, as writes of a guest would.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for a range outside of the memory, and
    /// [`Code::Failed`](crate::error::Code::Failed) for ROM or if a page is not available.
    pub fn write_at(&self, at: MemoryOffset, bytes: &[u8]) -> Result<()> {
        self.0.mapping.write(at, bytes).map_err(|e| self.refused("write", at, bytes.len(), &e))
    }

    /// Loads one byte of a page, as a guest would. If the page is not available, the process receives SIGBUS.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for a page outside of the memory.
    pub fn touch(&self, page: PageIndex) -> Result<u8> {
        let at = MemoryOffset::new(page.get().saturating_mul(PAGE_SIZE));
        self.0.mapping.load(at).map_err(|e| self.refused("read", at, 1, &e))
    }

    /// Stores one byte, as a guest would. On ROM the process receives SIGSEGV.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for an offset outside of the memory.
    pub fn poke(&self, at: MemoryOffset, value: u8) -> Result<()> {
        self.0.mapping.store(at, value).map_err(|e| self.refused("write", at, 1, &e))
    }

    /// Copies pages of private memory that the guest is expected to write (`MADV_POPULATE_WRITE`), such as the written
    /// pages of a working set. Each page of the range is then dirty, with unchanged bytes.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for a range outside of the memory, and
    /// [`Code::Failed`](crate::error::Code::Failed) for ROM or if a page is not available.
    pub fn prefault_writes(&self, pages: std::ops::Range<PageIndex>) -> Result<()> {
        let byte = |page: PageIndex| page.get().saturating_mul(PAGE_SIZE);
        let (start, end) = (byte(pages.start), byte(pages.end));
        let length = to_usize(end.saturating_sub(start));
        if self.protection() == Protection::Read {
            return Err(self.refused(
                "write",
                MemoryOffset::new(start),
                length,
                &io::ErrorKind::PermissionDenied.into(),
            ));
        }
        let done = self.0.mapping.advise(start..end, Advice::PopulateWrite);
        done.map_err(|e| self.refused("write", MemoryOffset::new(start), length, &e))
    }

    /// Returns the pages that this process has copied since the mapping was created, as page ranges from the start of
    /// the memory. The result is exact. Shared memory and ROM have no copied pages; in anonymous memory every existing
    /// page counts as copied. Do not map other memory over the memory of a backend, for example for a balloon: such
    /// pages differ from the file, and are not reported.
    ///
    /// # Errors
    /// Returns an error if `/proc/self/pagemap` cannot be read.
    pub fn dirty(&self) -> Result<Vec<PageRange>> {
        page_ranges(&Pagemap::this_process()?, self.address_range())
    }

    /// Lets `stencil dirty --since` find every page that this process writes after a mark, also pages that it has copied
    /// before. The memory is registered with a userfaultfd for asynchronous write protection until the last handle is
    /// dropped. The first write to a page after a mark takes one more page fault, and the kernel maps pages of the file
    /// one by one instead of up to 16 at a time.
    ///
    /// # Errors
    /// Returns an error if the kernel has no asynchronous write protection, or refuses userfaultfd(2) to this process.
    pub fn track_writes(&self) -> Result<()> {
        let mut tracking = self.0.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        if tracking.is_none() {
            let range = self.address_range();
            *tracking = Some(userfault::track_writes(range.start..range.end.next_multiple_of(PAGE_SIZE))?);
        }
        Ok(())
    }

    fn refused(&self, what: &str, at: MemoryOffset, length: usize, cause: &io::Error) -> Error {
        let place =
            format!("cannot {what} memory of '{}' at {:#x}, length {length}", self.0.plan.id, at.get());
        if cause.kind() == io::ErrorKind::InvalidInput {
            return Error::usage(format!("{place}: size is {} bytes", self.len().get()));
        }
        if what == "write" && self.protection() == Protection::Read {
            return Error::failed(format!("{place}: memory is ROM"));
        }
        Error::failed(format!("{place}: {}", errno_text(cause)))
            .hint("run 'stencil verify' to check the template for damage")
    }
}

fn cannot_extend(plan: &Plan, length: u64, cause: io::Error) -> Error {
    match &plan.source {
        Source::File { path, .. } => {
            Error::io(format!("cannot extend backing store to {length} bytes"), path, cause)
        }
        Source::Anonymous | Source::Memfd => map_failed(cause),
    }
}

/// Returns QEMU's error for anonymous memory that cannot be allocated.
fn cannot_set_up(region: &str, cause: &io::Error) -> Error {
    let words = match cause.raw_os_error() {
        Some(_) => errno_text(cause),
        // No errno: the size exceeds the maximum length of a file or mapping.
        None => errno_text(&io::Error::from_raw_os_error(libc::ENOMEM)),
    };
    Error::failed(format!("cannot set up guest memory '{region}': {words}"))
}

fn new_memfd(region: &str, length: Bytes) -> Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    // The kernel limits the name to 249 bytes.
    let name: String = region.chars().filter(char::is_ascii).take(200).collect();
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| cannot_set_up(region, &e.into()))?;
    let file = File::from(fd);
    file.set_len(length.get()).map_err(|e| cannot_set_up(region, &e))?;
    Ok(file)
}

fn map(plan: &Plan, layout: &Layout, file: Option<&File>, offset: FileOffset) -> Result<Mapping> {
    Mapping::new(&Request {
        length: layout.length,
        align: layout.align,
        file: file.map(|f| (f.as_fd(), offset)),
        protection: plan.protection,
        sharing: plan.sharing,
        reserve: plan.reserve,
        sync: plan.sync,
    })
    .map_err(|cause| match plan.source {
        Source::File { .. } => map_failed(cause),
        Source::Anonymous | Source::Memfd => cannot_set_up(&plan.region, &cause),
    })
}

fn advise(plan: &Plan, mapping: &Mapping, fuse: bool, notes: &mut Vec<Note>) -> Result<()> {
    // Like QEMU, errors of these two calls are ignored.
    if fuse {
        notes.push(Note::no_huge_advice());
    } else {
        let _ = mapping.advise_all(Advice::HugePage);
    }
    let _ = mapping.advise_all(Advice::DontFork);
    let set = |wanted: bool, advice: Advice, property: &str| {
        if !wanted {
            return Ok(());
        }
        mapping.advise_all(advice).map_err(|e| {
            let words = errno_text(&e);
            Error::failed(format!("Couldn't set property '{property}' on '{}': {words}", plan.type_name))
        })
    };
    set(plan.merge, Advice::Mergeable, "merge")?;
    set(!plan.dump, Advice::DontDump, "dump")?;
    if let Some(mode) = plan.numa.mode() {
        mapping.bind(mode, &plan.numa.nodes).map_err(|e| {
            Error::failed(format!("cannot bind memory to host NUMA nodes: {}", errno_text(&e)))
        })?;
    }
    Ok(())
}

/// Minimum number of bytes per preallocating thread.
const BYTES_PER_THREAD: u64 = 64 << 20;

fn fill(plan: &Plan, mapping: &Mapping) -> Result<()> {
    if let Some(max_threads) = plan.prealloc {
        prealloc(mapping, max_threads)?;
    }
    if plan.prefault {
        mapping.advise_all(Advice::PopulateRead).map_err(|e| {
            Error::failed(format!("cannot read every page of the backing store: {}", errno_text(&e)))
                .hint("run 'stencil verify' to check the template for damage")
        })?;
    }
    Ok(())
}

fn prealloc(mapping: &Mapping, max_threads: u32) -> Result<()> {
    let length = mapping.len().get();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let threads = cpus.min(u64::from(max_threads)).min(length / BYTES_PER_THREAD).max(1);
    let share = (length / threads).next_multiple_of(HUGE_PAGE_SIZE);
    let done: io::Result<()> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|n| ((n * share).min(length), ((n + 1) * share).min(length)))
            .filter(|(from, to)| from < to)
            .map(|(from, to)| {
                let work = move || mapping.advise(from..to, Advice::PopulateWrite);
                std::thread::Builder::new().spawn_scoped(scope, work)
            })
            .collect::<io::Result<_>>()?;
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => Err(io::Error::other("a preallocating thread panicked")),
        })
    });
    done.map_err(|e| {
        Error::failed(format!("qemu_prealloc_mem: preallocating memory failed: {}", errno_text(&e)))
    })
}
