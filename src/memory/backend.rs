//! A plan carried out: the file is open, the memory mapped. After that nothing about it can change.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::error::{Error, Result, errno_text};
use crate::sys::mapping::{Advice, Mapping, Protection, Request, Sharing};
use crate::sys::pagemap::Pagemap;
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE, PageIndex};

use super::dirty::{PageRange, page_ranges};
use super::file::{self, Undo};
use super::note::Note;
use super::options::Options;
use super::plan::{FileFacts, Layout, Plan, Source, map_failed};
use super::row::Role;

/// A mapped memory object. Cloning the value gives another handle to the same memory, which is
/// unmapped when the last handle is dropped: a VMM keeps one in every region it makes of it.
#[derive(Debug, Clone)]
pub struct Backend(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mapping: Mapping,
    file: Option<File>,
    plan: Plan,
    notes: Vec<Note>,
    /// Of a trial: unlinks a file that it made. Dropped after the mapping.
    _undo: Undo,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.plan.discard {
            // QEMU, too, does not look whether the file could do it; the plan's notes say where it cannot.
            let _ = self.mapping.advise_all(Advice::Remove);
        }
    }
}

impl Backend {
    /// Opens and maps what an object's text asks for.
    ///
    /// # Errors
    /// QEMU's words for everything that it would refuse, and our own refusals.
    pub fn from_text(text: &str) -> Result<Backend> {
        Backend::create(&Options::parse(text)?.plan()?)
    }

    /// Carries out a plan.
    ///
    /// # Errors
    /// QEMU's words for everything that it would refuse, and our own refusals. Nothing stays mapped,
    /// and a file that was made for it is gone again.
    pub fn create(plan: &Plan) -> Result<Backend> {
        Backend::make(plan.clone(), false)
    }

    /// Carries out a plan to see what comes of it: when the last handle is dropped the file is as it
    /// was before, unless somebody wrote to it through a shared mapping.
    ///
    /// # Errors
    /// As [`Backend::create`].
    pub fn trial(plan: &Plan) -> Result<Backend> {
        Backend::make(plan.for_trial(), true)
    }

    fn make(mut plan: Plan, trial: bool) -> Result<Backend> {
        let (opened, offset) = match &plan.source {
            Source::File { path, open, offset } => (Some(file::open(&plan, path, *open)?), *offset),
            Source::Anonymous | Source::Memfd => (None, FileOffset::new(0)),
        };
        let facts = opened.as_ref().map_or(FileFacts::NONE, |o| o.facts);
        let layout = plan.layout(&facts)?;
        let refused = plan.check_mapped(&facts).err();
        let made = opened.as_ref().is_some_and(|o| o.undo.is_armed());
        let extend_to = layout.extend_to.filter(|_| refused.is_none());
        let not_extended = match (extend_to, &opened) {
            // An empty file that somebody else may use stays empty in a trial: it is mapped, not touched.
            (Some(_), Some(_)) if trial && !made => {
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
        let mapping = map(&plan, &layout, file.as_ref(), offset)?;
        // In QEMU's order: what cannot be mapped is named before anything else.
        if let Some(error) = not_extended.or(refused) {
            return Err(error);
        }
        let mut notes = plan.notes.clone();
        if let (true, false, Source::File { path, .. }) = (plan.sync, mapping.is_sync(), &plan.source) {
            notes.push(Note::no_sync(path));
        }
        advise(&plan, &mapping, fuse, &mut notes)?;
        fill(&plan, &mapping)?;
        if !trial {
            undo.disarm();
        }
        Ok(Backend(Arc::new(Inner { mapping, file, plan, notes, _undo: undo })))
    }

    /// Bytes of memory.
    pub fn len(&self) -> Bytes {
        self.0.mapping.len()
    }

    /// Never: a backend has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// First byte of the memory; valid while any handle lives. Dereferencing it is unsafe.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.mapping.as_ptr()
    }

    /// Addresses of the memory in this process.
    pub fn address_range(&self) -> std::ops::Range<u64> {
        self.0.mapping.range()
    }

    /// The open file behind the memory, where there is one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.file.as_ref().map(AsFd::as_fd)
    }

    /// Where in the file the memory begins.
    pub fn file_offset(&self) -> FileOffset {
        match self.0.plan.source {
            Source::File { offset, .. } => offset,
            Source::Anonymous | Source::Memfd => FileOffset::new(0),
        }
    }

    /// What the memory may be used for.
    pub fn protection(&self) -> Protection {
        self.0.mapping.protection()
    }

    /// Who sees a write.
    pub fn sharing(&self) -> Sharing {
        self.0.mapping.sharing()
    }

    /// The `mmap` flags that it was mapped with, without `MAP_FIXED`: what a VMM tells others of the mapping.
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

    /// What the guest gets.
    pub fn role(&self) -> Role {
        self.0.plan.role
    }

    /// The plan that was carried out.
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// What the user should know about it.
    pub fn notes(&self) -> &[Note] {
        &self.0.notes
    }

    /// Copies memory out. Where a guest would get SIGBUS (a damaged page, a file that shrank) this is
    /// an error.
    ///
    /// # Errors
    /// Usage outside of the memory; failed where a page cannot be had.
    pub fn read_at(&self, at: MemoryOffset, out: &mut [u8]) -> Result<()> {
        self.0.mapping.read(at, out).map_err(|e| self.refused("read", at, out.len(), &e))
    }

    /// Copies bytes into memory, as a guest's writes would.
    ///
    /// # Errors
    /// Usage outside of the memory; failed on ROM and where a page cannot be had.
    pub fn write_at(&self, at: MemoryOffset, bytes: &[u8]) -> Result<()> {
        self.0.mapping.write(at, bytes).map_err(|e| self.refused("write", at, bytes.len(), &e))
    }

    /// Loads one byte of a page, as a guest would: if the page cannot be had the process gets SIGBUS.
    ///
    /// # Errors
    /// Usage outside of the memory.
    pub fn touch(&self, page: PageIndex) -> Result<u8> {
        let at = MemoryOffset::new(page.get().saturating_mul(PAGE_SIZE));
        self.0.mapping.load(at).map_err(|e| self.refused("read", at, 1, &e))
    }

    /// Stores one byte, as a guest would: on ROM the process gets SIGSEGV.
    ///
    /// # Errors
    /// Usage outside of the memory.
    pub fn poke(&self, at: MemoryOffset, value: u8) -> Result<()> {
        self.0.mapping.store(at, value).map_err(|e| self.refused("write", at, 1, &e))
    }

    /// The pages that this process has copied since it mapped them, exact, as ranges from the start of
    /// the memory. On shared memory and ROM there are none; on memory without a file: all that exist.
    ///
    /// # Errors
    /// Whatever looking at `/proc/self/pagemap` gives.
    pub fn dirty(&self) -> Result<Vec<PageRange>> {
        page_ranges(&Pagemap::this_process()?, self.address_range())
    }

    fn refused(&self, what: &str, at: MemoryOffset, length: usize, cause: &io::Error) -> Error {
        let place = format!("cannot {what} {length} bytes at {:#x} of '{}'", at.get(), self.0.plan.id);
        if cause.kind() == io::ErrorKind::InvalidInput {
            return Error::usage(format!("{place}: it has {} bytes", self.len().get()));
        }
        if what == "write" && self.protection() == Protection::Read {
            return Error::failed(format!("{place}: it is ROM"));
        }
        Error::failed(format!("{place}: {}", errno_text(cause)))
            .remedy("a page of the backing store cannot be had: look for damage with stencil verify")
    }
}

fn cannot_extend(plan: &Plan, length: u64, cause: io::Error) -> Error {
    match &plan.source {
        Source::File { path, .. } => {
            Error::io(format!("cannot extend the backing store to {length} bytes"), path, cause)
        }
        Source::Anonymous | Source::Memfd => map_failed(cause),
    }
}

/// QEMU's words for memory without a file that cannot be had.
fn cannot_set_up(region: &str, cause: &io::Error) -> Error {
    let words = match cause.raw_os_error() {
        Some(_) => errno_text(cause),
        // More than a file can be long.
        None => errno_text(&io::Error::from_raw_os_error(libc::ENOMEM)),
    };
    Error::failed(format!("cannot set up guest memory '{region}': {words}"))
}

fn new_memfd(region: &str, length: Bytes) -> Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    // The kernel takes at most 249 bytes for a name.
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
    // As QEMU: whether the kernel takes these two is not looked at.
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

/// Bytes that one preallocating thread gets at least.
const BYTES_PER_THREAD: u64 = 64 << 20;

fn fill(plan: &Plan, mapping: &Mapping) -> Result<()> {
    if let Some(most) = plan.prealloc {
        prealloc(mapping, most)?;
    }
    if plan.prefault {
        mapping.advise_all(Advice::PopulateRead).map_err(|e| {
            Error::failed(format!("cannot read every page of the backing store: {}", errno_text(&e)))
                .remedy("look for damage with stencil verify")
        })?;
    }
    Ok(())
}

fn prealloc(mapping: &Mapping, most: u32) -> Result<()> {
    let length = mapping.len().get();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let threads = cpus.min(u64::from(most)).min(length / BYTES_PER_THREAD).max(1);
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
            Err(_) => Err(io::Error::other("a preallocating thread died")),
        })
    });
    done.map_err(|e| {
        Error::failed(format!("qemu_prealloc_mem: preallocating memory failed: {}", errno_text(&e)))
    })
}
