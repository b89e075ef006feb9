//! The backings of a mount. They belong to the FUSE connection: the supervisor keeps them across servers.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use stencilfs::control::{BackingRow, Chosen, FileKey, Stage};
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;
use stencilfs::sys::fuse_dev;
use stencilfs::units::Bytes;

use crate::kept;
use crate::link::{MAX_KEYS, SupervisorReply};

/// Most files with an entry: a backing, or the reason why there is none.
const MAX_ENTRIES: usize = 4096;
/// Longest file name, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// Longest reason, in characters.
const MAX_REASON: usize = 400;

/// The backing of one file, or the reason why there is none.
#[derive(Debug)]
pub struct Backing {
    /// State of the backing.
    pub row: BackingRow,
    /// The backing file, once it is created.
    pub file: Option<OwnedFd>,
}

/// All backings of a mount.
#[derive(Debug, Default)]
pub struct Backings(Vec<Backing>);

impl Backings {
    /// Restores the backings of another supervisor; `file` returns the descriptor of a row.
    pub fn restore(rows: Vec<BackingRow>, mut file: impl FnMut(&BackingRow) -> Option<OwnedFd>) -> Backings {
        Backings(rows.into_iter().map(|row| Backing { file: file(&row), row }).collect())
    }

    /// Returns all rows, with the descriptor numbers of this process.
    pub fn rows(&self) -> Vec<BackingRow> {
        let number = |b: &Backing| b.file.as_ref().map(AsRawFd::as_raw_fd);
        self.0.iter().map(|b| BackingRow { descriptor: number(b), ..b.row.clone() }).collect()
    }

    /// Returns the descriptors of all backings, including those that are being filled.
    pub fn all_files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.0.iter().filter_map(|b| b.file.as_ref())
    }

    /// Returns the descriptors of the ready backings.
    pub fn files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.ready().map(|(_, file)| file)
    }

    /// Returns the descriptor of the ready backing at `index` of [`rows`](Self::rows).
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](stencilfs::error::Code::NotFound) if there is no ready backing at this index.
    pub fn file(&self, index: usize) -> Result<&OwnedFd> {
        let backing = self.0.get(index).filter(|b| b.row.id.is_some());
        backing.and_then(|b| b.file.as_ref()).ok_or_else(|| Error::not_found("no such backing"))
    }

    /// Returns the ids of the ready backings, with their descriptors.
    pub fn ready(&self) -> impl Iterator<Item = (u32, &OwnedFd)> {
        self.0.iter().filter_map(|b| Some((b.row.id?, b.file.as_ref()?)))
    }

    /// Duplicates the descriptor of a file's ready backing.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](stencilfs::error::Code::NotFound) if the file has no ready backing, and an error if
    /// the process has no free descriptor.
    pub fn copy(&self, key: &FileKey) -> Result<OwnedFd> {
        let backing = self.0.iter().find(|b| b.row.key == *key && b.row.id.is_some());
        let file =
            backing.and_then(|b| b.file.as_ref()).ok_or_else(|| Error::not_found("no such backing"))?;
        kept::duplicate(file)
    }

    /// Returns the id of a file's backing.
    pub fn id(&self, key: &FileKey) -> Option<u32> {
        self.0.iter().find(|b| b.row.key == *key)?.row.id
    }

    fn find(&mut self, key: &FileKey) -> Option<&mut Backing> {
        self.0.iter_mut().find(|b| b.row.key == *key)
    }

    fn unfinished(&mut self, key: &FileKey) -> Result<&mut Backing> {
        self.find(key)
            .filter(|b| b.row.id.is_none() && b.row.stage != Stage::None)
            .ok_or_else(|| Error::failed("no space is reserved for that backing"))
    }

    fn entry(&mut self, key: FileKey) -> Result<&mut Backing> {
        let at = match self.0.iter().position(|b| b.row.key == key) {
            Some(at) => at,
            None if key.file.len() > MAX_NAME => {
                return Err(Error::usage(format!("a file name of {} bytes is too long", key.file.len())));
            }
            None if self.0.len() >= MAX_ENTRIES => {
                return Err(Error::try_again(format!("the limit of {MAX_ENTRIES} backings is reached")));
            }
            None => {
                let (id, descriptor, why) = (None, None, None);
                let stage = Stage::None;
                let row =
                    BackingRow { key, stage, id, descriptor, identity: (0, 0), reserved: 0, filled: 0, why };
                self.0.push(Backing { row, file: None });
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[at])
    }

    /// Resets unfinished backings after the death of a server: its successor fills them again. Keeps the reasons why
    /// files have no backing: an open that was answered with ESTALE looks up the name again, and the successor must
    /// return the decode number. Returns the unfinished files, to be closed.
    pub fn forget_unfinished(&mut self) -> Vec<OwnedFd> {
        let mut files = Vec::new();
        self.0.retain_mut(|b| {
            if b.row.id.is_none() {
                (b.row.stage, b.row.reserved, b.row.filled) = (Stage::None, 0, 0);
                files.extend(b.file.take());
            }
            b.row.id.is_some() || b.row.why.is_some()
        });
        files
    }

    /// Reserves space ([`SupervisorReply::Room`]), or names the backings that would have to be evicted
    /// ([`SupervisorReply::Evict`]). Returns the id of a backing that became ready under an earlier server
    /// ([`SupervisorReply::Backing`]).
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if the backing does not fit into the cache.
    pub fn reserve(&mut self, chosen: &Chosen, key: &FileKey, bytes: u64) -> Result<SupervisorReply> {
        if let Some(id) = self.id(key) {
            return Ok(SupervisorReply::Backing(id));
        }
        let needs = format!("the backing needs {}", Bytes::new(bytes));
        if bytes > chosen.most.get() {
            return Err(Error::try_again(format!("{needs}, the cache is limited to {}", chosen.most))
                .remedy("mount with a larger --cache-size"));
        }
        let others: u64 = self.0.iter().filter(|b| b.row.key != *key).map(|b| b.row.reserved).sum();
        let mut excess = (others + bytes).saturating_sub(chosen.most.get());
        if excess == 0 {
            let backing = self.entry(key.clone())?;
            backing.row.reserved = bytes;
            backing.row.stage = Stage::Room;
            return Ok(SupervisorReply::Room);
        }
        let mut candidates: Vec<_> =
            self.0.iter().filter(|b| b.row.key != *key && b.row.id.is_some()).collect();
        candidates.sort_by_key(|b| b.row.reserved);
        let mut evicted = Vec::new();
        for backing in candidates.into_iter().take(MAX_KEYS) {
            evicted.push(backing.row.key.clone());
            excess = excess.saturating_sub(backing.row.reserved);
        }
        if excess > 0 || evicted.is_empty() {
            let taken = Bytes::new(others);
            return Err(Error::try_again(format!(
                "{needs}, but {taken} of the cache's {} are in use",
                chosen.most
            )));
        }
        Ok(SupervisorReply::Evict(evicted))
    }

    /// Stores the empty file that was created for a backing.
    ///
    /// # Errors
    /// Returns an error if no space is reserved for the backing.
    pub fn made(&mut self, key: &FileKey, file: OwnedFd) -> Result<&OwnedFd> {
        let identity = kept::identity(&file)?;
        let backing = self.unfinished(key)?;
        backing.row.identity = identity;
        backing.row.stage = Stage::Room;
        Ok(backing.file.insert(file))
    }

    /// Returns the file to freeze and its reserved space; `None` if the file is frozen already.
    ///
    /// # Errors
    /// Returns an error if no file was created for the backing.
    pub fn filled(&mut self, key: &FileKey) -> Result<Option<(&OwnedFd, Bytes)>> {
        let backing = self.unfinished(key)?;
        if backing.row.stage == Stage::Frozen {
            return Ok(None);
        }
        let file =
            backing.file.as_ref().ok_or_else(|| Error::failed("no file was created for that backing"))?;
        Ok(Some((file, Bytes::new(backing.row.reserved))))
    }

    /// Records that a backing is frozen.
    pub fn frozen(&mut self, key: &FileKey) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.stage = Stage::Frozen;
        }
    }

    /// Registers a frozen backing, whose content the server has verified, with the connection.
    ///
    /// # Errors
    /// Returns an error if the backing is not frozen, if the server verified another file, or if the kernel rejects it.
    pub fn register(&mut self, fuse: &OwnedFd, key: &FileKey, compared: (u64, u64)) -> Result<u32> {
        // A repeated request returns the same id: the kernel fails opens that use a second id for an inode in use.
        if let Some(id) = self.find(key).and_then(|b| b.row.id) {
            return Ok(id);
        }
        let backing = self.unfinished(key)?;
        if backing.row.identity != compared {
            return Err(Error::failed("the server verified another file than the one of that backing"));
        }
        let file = backing.file.as_ref().filter(|_| backing.row.stage == Stage::Frozen);
        let file = file.ok_or_else(|| Error::failed("that backing is not frozen"))?;
        let id = fuse_dev::backing_open(fuse, file.as_fd()).map_err(|e| {
            let stacked = e.raw_os_error() == Some(libc::ELOOP);
            let error = Error::failed("the kernel rejects the backing").because(e);
            if stacked { error.remedy("use --cache-dir with a directory on ext4 or xfs") } else { error }
        })?;
        backing.row.id = Some(id);
        backing.row.filled = backing.row.reserved;
        backing.row.why = None;
        Ok(id)
    }

    /// Returns the files of a template that have a ready backing.
    pub fn keys_of(&self, digest: &Digest) -> Vec<FileKey> {
        let ready = self.0.iter().filter(|b| b.row.key.digest == *digest && b.row.id.is_some());
        ready.map(|b| b.row.key.clone()).collect()
    }

    /// Same as [`close`](Self::close), but returns the backing files, to be closed by another process.
    pub fn close_with_files(&mut self, fuse: &OwnedFd, keys: &[FileKey]) -> Vec<OwnedFd> {
        let wanted = |b: &&mut Backing| keys.contains(&b.row.key);
        let files = self.0.iter_mut().filter(wanted).filter_map(|b| b.file.take()).collect();
        self.close(fuse, keys);
        files
    }

    /// Closes backings that are unused and no longer served.
    pub fn close(&mut self, fuse: &OwnedFd, keys: &[FileKey]) {
        self.0.retain(|b| match b.row.id {
            Some(id) if keys.contains(&b.row.key) => {
                if let Err(error) = fuse_dev::backing_close(fuse, id) {
                    log::error!(
                        "cannot close the backing of {} {}: {error}",
                        b.row.key.digest,
                        b.row.key.file
                    );
                }
                // The server still has the file open: its disk space is released later.
                false
            }
            _ => true,
        });
    }

    /// Records the reason why a file has no backing, or with `None` that a new attempt has begun. A late backing is
    /// still being filled.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if the limit of entries is reached.
    pub fn decode(&mut self, key: FileKey, why: Option<String>) -> Result<()> {
        let backing = self.entry(key)?;
        if backing.row.id.is_none() {
            // Bounded, as the reason stays in locked memory and in the ledger.
            let plain = |c: char| if c.is_control() { ' ' } else { c };
            backing.row.why = why.map(|why| why.chars().take(MAX_REASON).map(plain).collect());
        }
        Ok(())
    }

    /// Releases the reserved space of an abandoned backing. Returns its file, to be closed.
    pub fn give_back(&mut self, key: &FileKey) -> Option<OwnedFd> {
        let backing = self.unfinished(key).ok()?;
        (backing.row.stage, backing.row.reserved, backing.row.filled) = (Stage::None, 0, 0);
        backing.file.take()
    }

    /// Records how many bytes of a backing are filled.
    pub fn progress(&mut self, key: &FileKey, bytes: u64) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.filled = backing.row.filled.max(bytes);
        }
    }
}
