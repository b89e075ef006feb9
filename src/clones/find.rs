//! Finds clones: every process that maps a template, whoever launched it.
//!
//! A mapping is known by the device and inode number of its file, which are the same in every mount and
//! PID namespace, below every bind mount, and after a lazy unmount; paths and open counts are not. A stacking file system
//! (overlayfs) shows its own device, and the inode number of the file below: 63 bits that no other file has by chance.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use serde::Serialize;

use crate::control::Mount;
use crate::error::{Error, Result};
use crate::store::{Digest, Serving, Store, Template, inode_number};
use crate::sys::process::ProcessId;
use crate::sys::users::{self, PATIENCE, Sight, Unseen};
use crate::sys::{address_space, mount, procfs};
use crate::units::{Bytes, FileOffset};

/// A file of a template as it is served by one mount in one way: what an inode number means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedFile {
    /// The template.
    pub digest: Digest,
    /// Index of the file within the template.
    pub index: usize,
    /// Name of the file.
    pub name: String,
    /// Its length.
    pub size: Bytes,
    /// How this inode is served.
    pub serving: Serving,
    /// Index of the mount in the list that [`Inodes::of`] was made from.
    pub mount: usize,
}

/// What the inode numbers of all mounts mean.
#[derive(Debug, Default)]
pub struct Inodes {
    files: HashMap<(u64, u64), Arc<ServedFile>>,
    /// The same files by inode number alone, in the first mount that has them.
    numbers: HashMap<u64, Arc<ServedFile>>,
    devices: Vec<u64>,
}

/// Which mappings are looked at.
#[derive(Debug, Clone)]
pub struct Wanted {
    devices: Vec<u64>,
    numbers: Arc<HashSet<u64>>,
    /// Other mounts of Stencil: one of the same store has the same inode numbers.
    others: Vec<u64>,
}

impl Wanted {
    /// True for a file on one of the devices, or for one of the inode numbers on a stacking file system.
    pub fn has(&self, dev: u64, ino: u64) -> bool {
        self.devices.contains(&dev) || (self.numbers.contains(&ino) && !self.others.contains(&dev))
    }
}

impl Inodes {
    /// The inodes of everything that these mounts can serve now.
    ///
    /// # Errors
    /// When the store of a mount cannot be read.
    pub fn of(mounts: &[Mount]) -> Result<Inodes> {
        let mut inodes = Inodes::on(mounts);
        let mut stores: BTreeMap<_, Store> = BTreeMap::new();
        for (mount, served_by) in mounts.iter().enumerate() {
            if !stores.contains_key(&served_by.store) {
                stores.insert(served_by.store.clone(), Store::open(&served_by.store)?);
            }
            let store = &stores[&served_by.store];
            for digest in store.digests()? {
                let template = match store.template(&digest) {
                    Ok(template) => template,
                    // Removed between the two calls, or damaged: `verify` is the one to say so.
                    Err(error) => {
                        log::warn!("template {digest} is left out: {error}");
                        continue;
                    }
                };
                inodes.add(store, &template, mount, served_by);
            }
        }
        Ok(inodes)
    }

    /// The inodes of templates in these mounts of their store.
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

    /// No inode of these mounts yet: a search for them tells whether every process can be looked into.
    pub fn on(mounts: &[Mount]) -> Inodes {
        Inodes { devices: mounts.iter().map(|mount| mount.device).collect(), ..Inodes::default() }
    }

    /// Which mappings may be of these files.
    ///
    /// # Errors
    /// When the mounts of this process cannot be listed.
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

    /// What a device and inode number mean; `None` for anything that is no file of a template. On another device the
    /// number decides: only what is [wanted](Self::wanted) is to be asked for.
    pub fn lookup(&self, dev: u64, ino: u64) -> Option<&Arc<ServedFile>> {
        match self.devices.contains(&dev) {
            true => self.files.get(&(dev, ino)),
            false => self.numbers.get(&ino),
        }
    }

    /// Every served file with its inode number, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Arc<ServedFile>)> {
        self.files.iter().map(|((_, ino), file)| (*ino, file))
    }
}

/// One mapping of a template in one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateMapping {
    /// The template.
    pub digest: Digest,
    /// File of the template.
    pub file: String,
    /// Device number of the mount, as `st_dev` has it.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// First address in the process.
    pub start: u64,
    /// Where the mapping begins in the file, in bytes.
    pub offset: FileOffset,
    /// Its size in bytes.
    pub length: Bytes,
    /// How its pages are served.
    pub serving: Serving,
    /// Index of the file within the template.
    #[serde(skip)]
    pub index: usize,
    /// Index of the mount.
    #[serde(skip)]
    pub mount: usize,
}

impl TemplateMapping {
    /// Its addresses.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.start..self.start + self.length.get()
    }
}

/// A process that maps at least one template, and the others that have its address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneProcess {
    /// Its process id, in this PID namespace.
    pub pid: u32,
    /// Its identity.
    pub identity: u64,
    /// Its mappings of templates, by address.
    pub maps: Vec<TemplateMapping>,
    /// Younger processes that have the same address space: their memory is this one's.
    pub others: Vec<ProcessId>,
}

impl CloneProcess {
    /// Which process it is.
    pub fn process(&self) -> ProcessId {
        ProcessId { pid: self.pid, identity: self.identity }
    }

    /// All processes of its address space, the oldest one first.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> {
        std::iter::once(self.process()).chain(self.others.iter().copied())
    }
}

/// What a search for clones brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// The processes that map a template, by pid.
    pub clones: Vec<CloneProcess>,
    /// Processes that could not be looked into: each may be one more.
    pub unseen: Unseen,
}

impl Search {
    /// The clones, if all of them are known.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) where a process was not seen: a list with holes would be a
    /// wrong number.
    pub fn complete(self) -> Result<Vec<CloneProcess>> {
        match self.holes() {
            None => Ok(self.clones),
            Some(holes) => Err(Error::try_again(holes).remedy(self.unseen.remedy())),
        }
    }

    /// One clone for each address space: its oldest process, with the others.
    fn by_address_space(mut self) -> Result<Search> {
        let maps = |clone: &CloneProcess| -> Vec<_> {
            clone.maps.iter().map(|m| (m.start, m.length.get(), m.dev, m.ino, m.offset.get())).collect()
        };
        let found = address_space::distinct(self.clones.iter().map(|clone| (clone.process(), maps(clone))))?;
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

    /// Names the processes that were not seen, if there are any.
    pub fn holes(&self) -> Option<String> {
        self.unseen.describe("be clones")
    }
}

/// Every process that maps a template of these mounts.
///
/// # Errors
/// When a store cannot be read, or `/proc` cannot be listed.
pub fn template_mappings(mounts: &[Mount]) -> Result<Search> {
    search(&Inodes::of(mounts)?)
}

/// Every process that maps one of these inodes.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn search(inodes: &Inodes) -> Result<Search> {
    if inodes.devices.is_empty() {
        return Ok(Search::default());
    }
    let wanted = inodes.wanted()?;
    let sight = users::look_at_all(PATIENCE, move |pid| lines_of(pid, &wanted))?;
    found(sight, inodes).by_address_space()
}

/// Every process that maps (`map`) or has open (`open`) one of these inodes, by template. All processes are searched
/// once.
///
/// # Errors
/// [`Code::TryAgain`](crate::error::Code::TryAgain) where a process was not seen; when `/proc` cannot be listed.
pub fn users(inodes: &Inodes) -> Result<BTreeMap<Digest, BTreeMap<u32, &'static str>>> {
    let mut using: BTreeMap<Digest, BTreeMap<u32, &'static str>> = BTreeMap::new();
    if inodes.devices.is_empty() {
        return Ok(using);
    }
    let wanted = inodes.wanted()?;
    let sight = users::users_where(inodes.devices.clone(), PATIENCE, move |dev, ino| wanted.has(dev, ino))?;
    Search { clones: Vec::new(), unseen: sight.unseen }.complete()?;
    for (pid, used) in sight.seen {
        let open = used.open.iter().map(|file| (file, "open"));
        // Last: what a process maps and has open counts as mapped.
        for ((dev, ino), how) in open.chain(used.mapped.iter().map(|file| (file, "map"))) {
            if let Some(file) = inodes.lookup(*dev, *ino) {
                using.entry(file.digest).or_default().insert(pid, how);
            }
        }
    }
    Ok(using)
}

/// The template mappings of one process; `None` when it has none or is gone.
///
/// # Errors
/// When the process may not be looked into, or lets nobody look in time.
pub fn look_at(pid: u32, inodes: &Inodes) -> Result<Option<CloneProcess>> {
    let wanted = inodes.wanted()?;
    let look = Arc::new(move |pid| lines_of(pid, &wanted));
    Ok(found(users::look_at_these(vec![pid], PATIENCE, look), inodes).complete()?.pop())
}

/// Which process has that number, and mappings of it.
type Lines = (ProcessId, Vec<procfs::MapLine>);

fn found(sight: Sight<Lines>, inodes: &Inodes) -> Search {
    let clone = |(pid, (process, lines)): (u32, Lines)| {
        let maps: Vec<TemplateMapping> = lines.iter().filter_map(|line| mapping(line, inodes)).collect();
        (!maps.is_empty()).then_some(CloneProcess {
            pid,
            identity: process.identity,
            maps,
            others: Vec::new(),
        })
    };
    Search { clones: sight.seen.into_iter().filter_map(clone).collect(), unseen: sight.unseen }
}

/// Which process has that number, and what it maps of what is wanted, if anything.
fn lines_of(pid: u32, wanted: &Wanted) -> io::Result<Option<Lines>> {
    let lines = procfs::maps(pid, |dev, ino| wanted.has(dev, ino)).map_err(io::Error::other)?;
    let Some(lines) = lines.filter(|lines| !lines.is_empty()) else { return Ok(None) };
    // The process of that number now may be another one than the maps were of: then the measurement finds it so.
    let process = ProcessId::of(pid).map_err(io::Error::other)?;
    Ok(process.map(|process| (process, lines)))
}

fn mapping(line: &procfs::MapLine, inodes: &Inodes) -> Option<TemplateMapping> {
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
        index: file.index,
        mount: file.mount,
    })
}
