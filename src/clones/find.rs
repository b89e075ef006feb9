//! Finds clones: all processes that map a template, whether or not Stencil launched them.
//!
//! A mapping is identified by the device and inode number of its file. Both are the same in every mount and PID
//! namespace, through every bind mount, and after a lazy unmount, unlike paths and open counts. A stacking file system
//! (overlayfs) shows its own device and the inode number of the lower file: 63 bits that no other file has by chance.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::control::Mount;
use crate::error::{Error, Result};
use crate::store::{Digest, Serving, Store, Template, inode_number};
use crate::sys::files::mount;
use crate::sys::process::holders::{self, SCAN_TIMEOUT, Sight, Unseen};
use crate::sys::process::{ProcessId, address_space, procfs};
use crate::units::{Bytes, FileOffset, HUGE_PAGE_SIZE};

pub mod dead_mount;
pub mod handlers;

/// A file of a template as one mount serves it: the target of an inode number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedFile {
    /// Digest of the template.
    pub digest: Digest,
    /// Index of the file within the template.
    pub index: usize,
    /// Name of the file.
    pub name: String,
    /// Length of the file.
    pub size: Bytes,
    /// How the inode is served.
    pub serving: Serving,
    /// Index of the mount in the list that was passed to [`Inodes::of`].
    pub mount: usize,
}

/// The template files of mounts, by inode number.
#[derive(Debug, Default)]
pub struct Inodes {
    files: HashMap<(u64, u64), Arc<ServedFile>>,
    /// The files by inode number alone, in the first mount that has them.
    numbers: HashMap<u64, Arc<ServedFile>>,
    devices: Vec<u64>,
    /// The store of each mount; empty for a list that has only some templates of one store.
    stores: Vec<Store>,
}

/// Process name of the commands of this program, such as one that keeps a working set in RAM. Simulated clones have
/// another name.
pub const COMMAND_NAME: &str = "stencil";

/// A filter for mappings.
#[derive(Debug, Clone)]
pub struct Wanted {
    devices: Vec<u64>,
    numbers: Arc<HashSet<u64>>,
    /// Other Stencil mounts. A mount of the same store has the same inode numbers.
    others: Vec<u64>,
}

impl Wanted {
    /// Returns true for a file on one of the devices, and for one of the inode numbers on a stacking file system.
    pub fn has(&self, dev: u64, ino: u64) -> bool {
        self.devices.contains(&dev) || (self.numbers.contains(&ino) && !self.others.contains(&dev))
    }
}

impl Inodes {
    /// Collects the inodes of all templates that these mounts can serve now.
    ///
    /// # Errors
    /// Returns an error if the store of a mount cannot be read.
    pub fn of(mounts: &[Mount]) -> Result<Inodes> {
        let mut inodes = Inodes::on(mounts);
        let mut stores: BTreeMap<_, Store> = BTreeMap::new();
        for (mount, served_by) in mounts.iter().enumerate() {
            if !stores.contains_key(&served_by.store) {
                stores.insert(served_by.store.clone(), Store::open(&served_by.store)?);
            }
            let store = &stores[&served_by.store];
            inodes.stores.push(store.clone());
            for digest in store.digests()? {
                match store.template(&digest) {
                    Ok(template) => inodes.add(store, &template, mount, served_by),
                    // The template was removed since the digests were read, or is damaged; `verify` reports damage.
                    Err(error) => log::warn!("skipping template {digest}: {error}"),
                }
            }
        }
        Ok(inodes)
    }

    /// Collects the inodes of templates in these mounts of their store.
    pub fn of_templates<'a>(
        store: &Store,
        templates: impl IntoIterator<Item = &'a Template>,
        mounts: &[Mount],
    ) -> Inodes {
        let mut inodes = Inodes::on(mounts);
        for template in templates {
            for (mount, served_by) in mounts.iter().enumerate() {
                inodes.add(store, template, mount, served_by);
            }
        }
        inodes
    }

    /// Creates an empty list for these mounts. A search with an empty list checks whether every process can be
    /// inspected.
    pub fn on(mounts: &[Mount]) -> Inodes {
        Inodes { devices: mounts.iter().map(|mount| mount.device).collect(), ..Inodes::default() }
    }

    /// Returns the filter for mappings of these files.
    ///
    /// # Errors
    /// Returns an error if the mounts of this process cannot be listed.
    pub fn wanted(&self) -> Result<Wanted> {
        let others = procfs::mounts()?.into_iter().filter(|line| line.fs_type == mount::FS_TYPE);
        let numbers = Arc::new(self.numbers.keys().copied().collect());
        Ok(Wanted { devices: self.devices.clone(), numbers, others: others.map(|line| line.dev).collect() })
    }

    fn add(&mut self, store: &Store, template: &Template, mount: usize, served_by: &Mount) {
        let (secret, digest) = (store.secret(), *template.digest());
        for (index, file) in template.files().iter().enumerate() {
            for serving in Serving::ALL {
                let ino = inode_number(&secret, &digest, &file.name, serving);
                let (name, size) = (file.name.clone(), file.size);
                let served = ServedFile { digest, index, name, size, serving, mount };
                let served = Arc::new(served);
                self.numbers.entry(ino).or_insert_with(|| Arc::clone(&served));
                self.files.insert((served_by.device, ino), served);
            }
        }
    }

    /// Returns the template file with this device and inode number, `None` for other files. On another device, the
    /// inode number alone decides, so call this only for [wanted](Self::wanted) files.
    pub fn lookup(&self, dev: u64, ino: u64) -> Option<&Arc<ServedFile>> {
        match self.devices.contains(&dev) {
            true => self.files.get(&(dev, ino)),
            false => self.numbers.get(&ino),
        }
    }

    /// Returns the store of a mount, given as the index in the list that was passed to [`Inodes::of`].
    pub fn store(&self, mount: usize) -> Option<&Store> {
        self.stores.get(mount)
    }

    /// Iterates over all served files with their inode numbers, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Arc<ServedFile>)> {
        self.files.iter().map(|((_, ino), file)| (*ino, file))
    }
}

/// One mapping of a template in one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateMapping {
    /// Digest of the template.
    pub digest: Digest,
    /// Name of the template's file.
    pub file: String,
    /// Device number of the mount, as in `st_dev`.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// First address of the mapping.
    pub start: u64,
    /// Offset of the mapping in the file, in bytes.
    pub offset: FileOffset,
    /// Size of the mapping, in bytes.
    pub length: Bytes,
    /// How the pages are served.
    pub serving: Serving,
    /// True for anonymous memory in place of pages that are zero in the template.
    pub anonymous: bool,
    /// Length of the file.
    #[serde(skip)]
    pub file_size: Bytes,
    /// Index of the file within the template.
    #[serde(skip)]
    pub index: usize,
    /// Index of the mount.
    #[serde(skip)]
    pub mount: usize,
}

impl TemplateMapping {
    /// Returns the addresses of the mapping.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.length.get()
    }

    /// A mapping of `pages` of a file with `file_pages` pages, at page `at` of the address space.
    #[cfg(test)]
    pub fn of_pages(at: u64, pages: Range<u64>, file_pages: u64) -> TemplateMapping {
        use crate::units::PAGE_SIZE;
        TemplateMapping {
            digest: Digest::new([0; 32]),
            file: "memory".into(),
            dev: 1,
            ino: 2,
            start: at * PAGE_SIZE,
            offset: FileOffset::new(pages.start * PAGE_SIZE),
            length: Bytes::new((pages.end - pages.start) * PAGE_SIZE),
            serving: Serving::Decode,
            anonymous: false,
            file_size: Bytes::new(file_pages * PAGE_SIZE),
            index: 0,
            mount: 0,
        }
    }

    /// Returns the distance between address and file offset, which all parts of one mapping have in common.
    pub fn distance(&self) -> u64 {
        self.start.wrapping_sub(self.offset.get())
    }

    /// Returns true if the address is congruent to the file offset modulo 2 MiB.
    pub fn is_aligned(&self) -> bool {
        self.distance().is_multiple_of(HUGE_PAGE_SIZE)
    }
}

/// A process that maps at least one template, and all processes that share its address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneProcess {
    /// Process id, in this PID namespace.
    pub pid: u32,
    /// Identity of the process.
    pub identity: u64,
    /// Mappings of templates, by address.
    pub maps: Vec<TemplateMapping>,
    /// Younger processes with the same address space. Their memory is counted for this process.
    pub others: Vec<ProcessId>,
    /// Addresses of data and code pages of the kernel (`[vvar]`, `[vdso]`).
    pub kernel_pages: Vec<Range<u64>>,
    /// A thread through which `/proc` shows the memory of the process: the first thread may have exited.
    thread: u32,
}

impl CloneProcess {
    /// Returns the process.
    pub fn process(&self) -> ProcessId {
        ProcessId { pid: self.pid, identity: self.identity }
    }

    /// Returns all processes of the address space, the oldest first.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> {
        std::iter::once(self.process()).chain(self.others.iter().copied())
    }
}

/// The result of a search for clones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// Processes that map a template, by pid.
    pub clones: Vec<CloneProcess>,
    /// Processes that could not be inspected; each may be a clone.
    pub unseen: Unseen,
}

impl Search {
    /// Returns the clones, if every process was inspected.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if a process could not be inspected: the list, and all
    /// sums over it, may be incomplete.
    pub fn complete(self) -> Result<Vec<CloneProcess>> {
        match self.holes() {
            None => Ok(self.clones),
            Some(holes) => Err(Error::try_again(holes).hint(self.unseen.remedy())),
        }
    }

    /// Merges processes that share an address space into one clone, named by the oldest process.
    fn by_address_space(mut self) -> Result<Search> {
        let maps = |clone: &CloneProcess| -> Vec<_> {
            clone.maps.iter().map(|m| (m.start, m.length.get(), m.dev, m.ino, m.offset.get())).collect()
        };
        let processes = self.clones.iter().map(|clone| (clone.process(), clone.thread, maps(clone)));
        let found = address_space::distinct(processes)?;
        self.unseen.silent.extend(found.unseen);
        let mut spaces: HashMap<u32, Vec<ProcessId>> = found.seen.into_iter().collect();
        self.clones.retain_mut(|clone| match spaces.remove(&clone.pid) {
            Some(processes) => {
                clone.others = processes[1..].to_vec();
                true
            }
            None => false,
        });
        Ok(self)
    }

    /// Describes the processes that could not be inspected, `None` if there are none.
    pub fn holes(&self) -> Option<String> {
        self.unseen.describe("be clones")
    }
}

/// Returns every process that maps a template of these mounts.
///
/// # Errors
/// Returns an error if a store cannot be read or `/proc` cannot be listed.
pub fn template_mappings(mounts: &[Mount]) -> Result<Search> {
    search(&Inodes::of(mounts)?)
}

/// The processes whose inspection has not returned, over several searches.
#[derive(Debug, Clone, Default)]
pub struct Inspections(Arc<Mutex<BTreeSet<u32>>>);

impl Inspections {
    fn processes(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(&self, pid: u32, inspect: impl FnOnce() -> T) -> T {
        self.processes().insert(pid);
        let result = inspect();
        self.processes().remove(&pid);
        result
    }
}

/// Returns every process that maps one of these inodes, except this one: a command maps a template only to measure or to
/// warm the template.
///
/// # Errors
/// Returns an error if `/proc` cannot be listed.
pub fn search(inodes: &Inodes) -> Result<Search> {
    search_again(inodes, SCAN_TIMEOUT, &Inspections::default())
}

/// Same as [`search`] with another time limit for each process. A process that an earlier search still inspects is
/// unseen at once, so repeated searches leave at most one blocked thread for each process.
///
/// # Errors
/// Same as [`search`].
pub fn search_again(inodes: &Inodes, timeout: Duration, inspections: &Inspections) -> Result<Search> {
    if inodes.devices.is_empty() {
        return Ok(Search::default());
    }
    let (wanted, own) = (inodes.wanted()?, std::process::id());
    let blocked = inspections.processes().clone();
    let skipped = blocked.clone();
    let inspections = inspections.clone();
    let mut sight = holders::look_at_all(timeout, move |pid| {
        let is_skipped = pid == own || skipped.contains(&pid);
        if is_skipped { Ok(None) } else { inspections.run(pid, || lines_of(pid, &wanted)) }
    })?;
    sight.unseen.silent.extend(blocked);
    found(sight, inodes).by_address_space()
}

/// Returns every process that maps (`map`) or has open (`open`) one of these inodes, by template. All processes are
/// scanned once.
///
/// # Errors
/// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if a process could not be inspected, and an error if
/// `/proc` cannot be listed.
pub fn users(inodes: &Inodes) -> Result<BTreeMap<Digest, BTreeMap<u32, &'static str>>> {
    let mut using: BTreeMap<Digest, BTreeMap<u32, &'static str>> = BTreeMap::new();
    if inodes.devices.is_empty() {
        return Ok(using);
    }
    let wanted = inodes.wanted()?;
    let sight =
        holders::users_where(inodes.devices.clone(), SCAN_TIMEOUT, move |dev, ino| wanted.has(dev, ino))?;
    Search { clones: Vec::new(), unseen: sight.unseen }.complete()?;
    for (pid, used) in sight.seen {
        let open = used.open.iter().map(|file| (file, "open"));
        // Mappings come last: a file that is both open and mapped counts as mapped.
        for ((dev, ino), how) in open.chain(used.mapped.iter().map(|file| (file, "map"))) {
            if let Some(file) = inodes.lookup(*dev, *ino) {
                using.entry(file.digest).or_default().insert(pid, how);
            }
        }
    }
    Ok(using)
}

/// Returns the template mappings of one process; `None` if it has none or has exited.
///
/// # Errors
/// Returns an error if the process cannot be inspected within the time limit.
pub fn look_at(pid: u32, inodes: &Inodes) -> Result<Option<CloneProcess>> {
    let wanted = inodes.wanted()?;
    let look = Arc::new(move |pid| lines_of(pid, &wanted));
    Ok(found(holders::look_at_these(vec![pid], SCAN_TIMEOUT, look), inodes).complete()?.pop())
}

/// The mappings of a process that maps a wanted file.
struct Lines {
    process: ProcessId,
    thread: u32,
    wanted: Vec<procfs::MapLine>,
    kernel: Vec<Range<u64>>,
}

fn found(sight: Sight<Lines>, inodes: &Inodes) -> Search {
    let clone = |(pid, lines): (u32, Lines)| {
        let maps: Vec<TemplateMapping> =
            lines.wanted.iter().filter_map(|line| mapping(line, inodes)).collect();
        (!maps.is_empty()).then_some(CloneProcess {
            pid,
            identity: lines.process.identity,
            maps,
            others: Vec::new(),
            kernel_pages: lines.kernel,
            thread: lines.thread,
        })
    };
    Search { clones: sight.seen.into_iter().filter_map(clone).collect(), unseen: sight.unseen }
}

/// Returns the process and its mappings of wanted files, `None` without such mappings.
fn lines_of(pid: u32, wanted: &Wanted) -> io::Result<Option<Lines>> {
    let Some((thread, text)) = procfs::maps_text(pid).map_err(io::Error::other)? else { return Ok(None) };
    let wanted = procfs::parse_maps(&text, |dev, ino| wanted.has(dev, ino));
    if wanted.is_empty() {
        return Ok(None);
    }
    let kernel = procfs::parse_maps(&text, |_, ino| ino == 0).into_iter();
    let kernel = kernel.filter(|line| line.path.starts_with("[v")).map(|line| line.start..line.end).collect();
    // The process id may have been reused since its mappings were read. The measurement detects this by the identity.
    let process = ProcessId::of(pid).map_err(io::Error::other)?;
    Ok(process.map(|process| Lines { process, thread, wanted, kernel }))
}

/// Returns the template mapping of a line, `None` for other files. Call it only for [wanted](Inodes::wanted) lines.
pub fn mapping(line: &procfs::MapLine, inodes: &Inodes) -> Option<TemplateMapping> {
    let file = inodes.lookup(line.dev, line.ino)?;
    Some(TemplateMapping {
        digest: file.digest,
        file: file.name.clone(),
        dev: line.dev,
        ino: line.ino,
        start: line.start,
        offset: FileOffset::new(line.offset),
        length: line.len(),
        serving: file.serving,
        anonymous: false,
        file_size: file.size,
        index: file.index,
        mount: file.mount,
    })
}
