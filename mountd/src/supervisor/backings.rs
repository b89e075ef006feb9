//! The backings of a mount. They belong to the connection: the supervisor keeps them while servers come and go.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

use stencilfs::control::Residency;
use stencilfs::error::{Error, Result};
use stencilfs::store::{Serving, inode_number};
use stencilfs::sys::{cachestat, fuse_dev, memfd};
use stencilfs::units::Bytes;

use super::cache::{self, Chosen};
use super::users;
use crate::link::{Answer, Cache, FileKey};

/// An open that was just answered with a backing reaches it within this time.
const GRACE: Duration = Duration::from_millis(200);

/// What is known of one file's backing.
#[derive(Debug, Default)]
pub struct Backing {
    fd: Option<OwnedFd>,
    id: Option<u32>,
    /// Bytes of room that are set aside for it.
    pub reserved: u64,
    /// Bytes of data in it.
    pub filled: u64,
    /// Why the file has none.
    pub why: Option<String>,
}

impl Backing {
    /// True when it is complete and registered.
    pub fn is_ready(&self) -> bool {
        self.id.is_some()
    }
}

/// All of them.
#[derive(Debug)]
pub struct Backings {
    chosen: Chosen,
    all: HashMap<FileKey, Backing>,
}

impl Backings {
    /// None yet.
    pub fn new(chosen: Chosen) -> Backings {
        Backings { chosen, all: HashMap::new() }
    }

    /// Where they are.
    pub fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// What is known of a file's backing.
    pub fn get(&self, key: &FileKey) -> Option<&Backing> {
        self.all.get(key)
    }

    /// Those that are ready, with their ids.
    pub fn ready(&self) -> Vec<(FileKey, u32)> {
        self.all.iter().filter_map(|(key, b)| Some((key.clone(), b.id?))).collect()
    }

    /// Room that is taken.
    pub fn used(&self) -> Bytes {
        Bytes::new(self.all.values().map(|b| b.reserved).sum())
    }

    /// A server has died: what it was making is gone with it, and its successor tries everything anew.
    pub fn forget_unfinished(&mut self) {
        self.all.retain(|_, b| b.is_ready());
    }

    /// Sets room aside, or names the backings that would have to go.
    ///
    /// # Errors
    /// [`Code::TryAgain`](stencilfs::error::Code::TryAgain) when it can never fit, or the filesystem is full.
    pub fn reserve(&mut self, key: FileKey, bytes: u64) -> Result<Answer> {
        let most = self.chosen.most.get();
        if bytes > most {
            return Err(Error::try_again(format!(
                "its backing needs {}, the cache may hold {}",
                Bytes::new(bytes),
                self.chosen.most
            ))
            .remedy("mount with a larger --cache-size"));
        }
        if let Cache::Directory(dir) = &self.chosen.cache {
            let free = cache::free_in(dir)?;
            if bytes > free.get() {
                return Err(Error::try_again(format!(
                    "its backing needs {}, the cache's filesystem has {free} free",
                    Bytes::new(bytes)
                ))
                .at(dir)
                .remedy("free space there, or name another --cache-dir"));
            }
        }
        let others: u64 = self.all.iter().filter(|(k, _)| **k != key).map(|(_, b)| b.reserved).sum();
        let mut excess = (others + bytes).saturating_sub(most);
        if excess == 0 {
            let backing = self.all.entry(key).or_default();
            backing.reserved = bytes;
            return Ok(Answer::Done);
        }
        let mut candidates: Vec<_> = self.all.iter().filter(|(k, b)| **k != key && b.is_ready()).collect();
        candidates.sort_by_key(|(_, b)| b.reserved);
        let mut leave = Vec::new();
        for (candidate, backing) in candidates {
            leave.push(candidate.clone());
            excess = excess.saturating_sub(backing.reserved);
        }
        if excess > 0 || leave.is_empty() {
            return Err(Error::try_again(format!(
                "its backing needs {}, of the cache's {} {} are taken",
                Bytes::new(bytes),
                self.chosen.most,
                Bytes::new(others)
            )));
        }
        Ok(Answer::Evict(leave))
    }

    /// Which of `keys` some process uses; those are not to be closed. Slow: it looks at every process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn find_unused(device: u64, secret: &[u8; 32], keys: Vec<FileKey>) -> Result<Vec<FileKey>> {
        std::thread::sleep(GRACE);
        let number = |k: &FileKey| inode_number(secret, &k.digest, &k.file, Serving::Passthrough);
        let inodes: HashSet<u64> = keys.iter().map(number).collect();
        let used = users::in_use(device, &inodes)?;
        Ok(keys.into_iter().filter(|k| !used.contains(&number(k))).collect())
    }

    /// Closes backings that nobody uses and nobody is handed any more.
    pub fn close(&mut self, fuse: &OwnedFd, keys: &[FileKey]) {
        for key in keys {
            if let Some(Backing { id: Some(id), .. }) = self.all.remove(key)
                && let Err(error) = fuse_dev::backing_close(fuse, id)
            {
                log::error!("cannot close the backing of {} {}: {error}", key.digest, key.file);
            }
        }
    }

    /// Freezes a filled backing: from here on nobody can change it, whoever holds a descriptor.
    ///
    /// # Errors
    /// When the filesystem refuses, or it is not a backing that room was set aside for.
    pub fn freeze(&mut self, key: &FileKey, fd: Option<OwnedFd>) -> Result<()> {
        let fd = fd.ok_or_else(|| Error::failed("no backing came with the question"))?;
        let backing = self
            .all
            .get_mut(key)
            .filter(|b| !b.is_ready())
            .ok_or_else(|| Error::failed("no room was set aside for that backing"))?;
        let frozen = match self.chosen.cache {
            Cache::Directory(_) => cache::freeze(&fd).map_err(Into::into),
            Cache::Memory => memfd::freeze(&fd),
            Cache::Nowhere(_) => Err(std::io::ErrorKind::Unsupported.into()),
        };
        frozen.map_err(|e| Error::failed("cannot freeze the backing").because(e))?;
        backing.fd = Some(fd);
        Ok(())
    }

    /// Registers a frozen backing, whose content the server has compared, with the connection.
    ///
    /// # Errors
    /// The kernel's, or when it was not frozen.
    pub fn register(&mut self, fuse: &OwnedFd, key: &FileKey) -> Result<u32> {
        let backing =
            self.all.get_mut(key).ok_or_else(|| Error::failed("no backing of that file is being made"))?;
        let fd = backing.fd.as_ref().ok_or_else(|| Error::failed("that backing is not frozen"))?;
        let id = fuse_dev::backing_open(fuse, fd).map_err(|e| {
            let stacked = e.raw_os_error() == Some(libc::ELOOP);
            let error = Error::failed("the kernel does not accept the backing").because(e);
            if stacked { error.remedy("name a directory on ext4 or xfs with --cache-dir") } else { error }
        })?;
        backing.id = Some(id);
        backing.filled = backing.reserved;
        backing.why = None;
        Ok(id)
    }

    /// Notes why a file has no backing, or that one is tried.
    pub fn decode(&mut self, key: FileKey, why: Option<String>) {
        let backing = self.all.entry(key).or_default();
        if backing.is_ready() {
            return;
        }
        // One that is late goes on being filled.
        backing.why = why;
    }

    /// Gives back the room of a backing that is given up.
    pub fn give_up(&mut self, key: &FileKey) {
        if let Some(backing) = self.all.get_mut(key).filter(|b| !b.is_ready()) {
            *backing = Backing { why: backing.why.take(), ..Backing::default() };
        }
    }

    /// Notes how far one is filled.
    pub fn progress(&mut self, key: &FileKey, bytes: u64) {
        if let Some(backing) = self.all.get_mut(key).filter(|b| !b.is_ready()) {
            backing.filled = backing.filled.max(bytes);
        }
    }

    /// What of each is in the page cache.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn residency(&self) -> Result<Vec<Residency>> {
        let mut files: Vec<Residency> = Vec::new();
        for (key, backing) in &self.all {
            if let Some(fd) = &backing.fd {
                files.push(Residency {
                    digest: key.digest,
                    file: key.file.clone(),
                    resident_bytes: cachestat::cached(fd)?.bytes(),
                });
            }
        }
        files.sort_by(|a, b| (a.digest, &a.file).cmp(&(b.digest, &b.file)));
        Ok(files)
    }
}
