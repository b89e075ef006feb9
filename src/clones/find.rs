//! Finds clones: every process that maps a template, whoever launched it.
//!
//! A mapping is known by the device and inode number of its file, which are the same in every mount and
//! PID namespace, below every bind mount, and after a lazy unmount; paths and open counts are not.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Serialize;

use crate::control::Mount;
use crate::error::{Error, Result};
use crate::store::{Digest, Serving, Store, Template, inode_number};
use crate::sys::process::ProcessId;
use crate::sys::users::{self, PATIENCE};
use crate::sys::{probe, procfs};
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
    devices: Vec<u64>,
}

impl Inodes {
    /// The inodes of everything that these mounts can serve now.
    ///
    /// # Errors
    /// When the store of a mount cannot be read.
    pub fn of(mounts: &[Mount]) -> Result<Inodes> {
        let mut inodes = Inodes { files: HashMap::new(), devices: mounts.iter().map(|m| m.device).collect() };
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

    /// The inodes of one template in these mounts of its store.
    pub fn of_template(store: &Store, template: &Template, mounts: &[Mount]) -> Inodes {
        let mut inodes = Inodes { files: HashMap::new(), devices: mounts.iter().map(|m| m.device).collect() };
        for (mount, served_by) in mounts.iter().enumerate() {
            inodes.add(store, template, mount, served_by);
        }
        inodes
    }

    fn add(&mut self, store: &Store, template: &Template, mount: usize, served_by: &Mount) {
        let (secret, digest) = (store.secret(), *template.digest());
        for (index, file) in template.files().iter().enumerate() {
            for serving in Serving::ALL {
                let ino = inode_number(&secret, &digest, &file.name, serving);
                let (name, size) = (file.name.clone(), file.size);
                let served = ServedFile { digest, index, name, size, serving, mount };
                self.files.insert((served_by.device, ino), Arc::new(served));
            }
        }
    }

    /// What a device and inode number mean; `None` for anything that is no file of a template.
    pub fn lookup(&self, dev: u64, ino: u64) -> Option<&Arc<ServedFile>> {
        self.files.get(&(dev, ino))
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

/// A process that maps at least one template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneProcess {
    /// Its process id, in this PID namespace.
    pub pid: u32,
    /// Its identity.
    pub identity: u64,
    /// Its mappings of templates, by address.
    pub maps: Vec<TemplateMapping>,
}

impl CloneProcess {
    /// Which process it is.
    pub fn process(&self) -> ProcessId {
        ProcessId { pid: self.pid, identity: self.identity }
    }
}

/// What a search for clones brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// The processes that map a template, by pid.
    pub clones: Vec<CloneProcess>,
    /// Processes that could not be looked into in time: each may be one more.
    pub unseen: Vec<u32>,
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
            Some(holes) => Err(Error::try_again(holes).remedy(
                "they wait for a file system that does not answer: `stencil doctor` names what is stuck",
            )),
        }
    }

    /// Names the processes that were not seen, if there are any.
    pub fn holes(&self) -> Option<String> {
        (!self.unseen.is_empty()).then(|| {
            format!(
                "processes that may be clones could not be looked into within {} s: {}",
                PATIENCE.as_secs(),
                users::list_pids(&self.unseen)
            )
        })
    }
}

/// Every process that maps a template of these mounts.
///
/// # Errors
/// When a store cannot be read, or a process may not be looked into.
pub fn template_mappings(mounts: &[Mount]) -> Result<Search> {
    search(&Inodes::of(mounts)?)
}

/// Every process that maps one of these inodes.
///
/// # Errors
/// When a process may not be looked into.
pub fn search(inodes: &Inodes) -> Result<Search> {
    if inodes.devices.is_empty() {
        return Ok(Search::default());
    }
    look_at_each(procfs::pids()?, inodes)
}

/// The template mappings of one process; `None` when it has none or is gone.
///
/// # Errors
/// When the process may not be looked into, or lets nobody look in time.
pub fn look_at(pid: u32, inodes: &Inodes) -> Result<Option<CloneProcess>> {
    Ok(look_at_each(vec![pid], inodes)?.complete()?.pop())
}

fn look_at_each(pids: Vec<u32>, inodes: &Inodes) -> Result<Search> {
    let devices = inodes.devices.clone();
    let looks = users::look_at_each(pids, PATIENCE, move |pid| lines_of(pid, &devices).transpose());
    let mut clones = Vec::new();
    for (pid, seen) in looks.seen {
        let (process, lines) = seen?;
        let maps: Vec<TemplateMapping> = lines.iter().filter_map(|line| mapping(line, inodes)).collect();
        if !maps.is_empty() {
            clones.push(CloneProcess { pid, identity: process.identity, maps });
        }
    }
    Ok(Search { clones, unseen: looks.unseen })
}

/// Which process has that number, and what it maps of these devices, if anything.
fn lines_of(pid: u32, devices: &[u64]) -> Result<Option<(ProcessId, Vec<procfs::MapLine>)>> {
    let lines = maps_of(pid, |dev, _| devices.contains(&dev))?.unwrap_or_default();
    if lines.is_empty() {
        return Ok(None);
    }
    // The process of that number now may be another one than the maps were of: then the measurement finds it so.
    Ok(ProcessId::of(pid)?.map(|process| (process, lines)))
}

/// The mappings of a process that `wanted` picks; `None` when it is gone, or out of reach even of root.
///
/// # Errors
/// Without the right to look into processes of others.
pub(super) fn maps_of(pid: u32, wanted: impl Fn(u64, u64) -> bool) -> Result<Option<Vec<procfs::MapLine>>> {
    match procfs::maps(pid, wanted) {
        Err(error) if !matches!(error.errno(), Some(libc::EACCES | libc::EPERM)) => Err(error),
        // With all that a tracer can have, what stays closed has more rights than root has here: the
        // manager of a container around us. `doctor` names it.
        Err(_) if probe::may_trace() => Ok(None),
        Err(_) => Err(Error::failed(format!("may not look into process {pid}, which may be a clone"))
            .remedy("run it as root: clones of all users count")),
        lines => lines,
    }
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
