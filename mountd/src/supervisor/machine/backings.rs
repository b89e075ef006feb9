//! Backings of a mount. They belong to the FUSE connection, so the supervisor keeps them across restarts of servers.
//!
//! ```text
//!   reserved ──▶ created ──▶ (filled by the server) ──▶ frozen ──▶ (verified by the server) ──▶ registered ──▶ closed
//! ```
//! The server fills a backing with a copy of the file's bytes or, for kernel decode, with an image that tells the
//! kernel where the bytes are in the packs. The step to frozen then replaces the image by the file that the kernel
//! decodes.
//!
//! A server needs the id of a backing to answer opens with it. It gets the id only after registration, when the file
//! that the server compared with the hashes is known to be the file that was frozen.

use std::os::fd::{AsRawFd, OwnedFd};

use stencilfs::control::{BackingRow, Chosen, FileKey, Stage};
use stencilfs::error::{Error, Result};
use stencilfs::store::{Digest, Proof};
use stencilfs::units::Bytes;

use crate::protocol::MAX_KEYS;
use crate::protocol::fds;
use crate::supervisor::kernel_decode::Opened;

/// Largest number of files for which a mount records a backing, or the reason why there is none.
const MAX_FILES: usize = 4096;
/// Longest file name in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// Longest reason in characters.
const MAX_REASON: usize = 400;

/// One backing, or the reason why a file has none.
#[derive(Debug)]
struct Backing {
    row: BackingRow,
    file: Option<OwnedFd>,
    /// For kernel decode: the proof of a verification. Not known for a backing of an earlier supervisor.
    proof: Option<Proof>,
}

/// A backing that is immutable.
#[derive(Debug)]
pub struct Frozen {
    /// A duplicate of the file to verify.
    pub file: OwnedFd,
    /// When the file was verified before, if nothing has changed since.
    pub verified_at: Option<u64>,
}

/// The result of a reservation.
#[derive(Debug, PartialEq, Eq)]
pub enum Reservation {
    /// Space is reserved; the file must be created.
    Create,
    /// The backing is already registered with this id: an earlier server made it.
    Ready(u32),
    /// The cache is full; there would be space without these backings.
    Evict(Vec<FileKey>),
}

/// The next step of a registration.
#[derive(Debug, PartialEq, Eq)]
pub enum Registration {
    /// The file must be registered with the kernel.
    Register,
    /// The backing is already registered with this id.
    AlreadyRegistered(u32),
}

/// All backings of a mount.
#[derive(Debug, Default)]
pub struct Backings(Vec<Backing>);

impl Backings {
    /// Restores the backings of an earlier supervisor. `file` returns the descriptor for a row.
    pub fn restore(rows: Vec<BackingRow>, mut file: impl FnMut(&BackingRow) -> Option<OwnedFd>) -> Backings {
        let backing = |mut row: BackingRow| {
            let file = file(&row);
            if file.is_none() && row.id.is_none() {
                // Only the earlier supervisor had the file. The server begins again.
                (row.stage, row.reserved, row.filled) = (Stage::None, 0, 0);
            }
            Backing { file, row, proof: None }
        };
        Backings(rows.into_iter().map(backing).collect())
    }

    /// Returns all rows, with the numbers of their descriptors in this process.
    pub fn rows(&self) -> Vec<BackingRow> {
        let number = |b: &Backing| b.file.as_ref().map(AsRawFd::as_raw_fd);
        self.0.iter().map(|b| BackingRow { descriptor: number(b), ..b.row.clone() }).collect()
    }

    /// Returns the descriptors of all backings, including unfinished ones.
    pub fn files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.0.iter().filter_map(|b| b.file.as_ref())
    }

    /// Returns the ids and descriptors of the registered backings.
    pub fn registered(&self) -> impl Iterator<Item = (u32, &OwnedFd)> {
        self.0.iter().filter_map(|b| Some((b.row.id?, b.file.as_ref()?)))
    }

    /// Duplicates the descriptor of the registered backing at an index of [`rows`](Self::rows).
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](stencilfs::error::Code::NotFound) if there is no registered backing at the index, and
    /// an error if the process is out of descriptors.
    pub fn copy_at(&self, index: usize) -> Result<OwnedFd> {
        let backing = self.0.get(index).filter(|b| b.row.id.is_some());
        copy_of(backing)
    }

    /// Duplicates the descriptor of the registered backing of a file.
    ///
    /// # Errors
    /// Same as [`copy_at`](Self::copy_at).
    pub fn copy(&self, key: &FileKey) -> Result<OwnedFd> {
        copy_of(self.0.iter().find(|b| b.row.key == *key && b.row.id.is_some()))
    }

    /// Returns the file of a backing, registered or not.
    pub fn file(&self, key: &FileKey) -> Option<&OwnedFd> {
        self.0.iter().find(|b| b.row.key == *key)?.file.as_ref()
    }

    fn find(&mut self, key: &FileKey) -> Option<&mut Backing> {
        self.0.iter_mut().find(|b| b.row.key == *key)
    }

    fn unfinished(&mut self, key: &FileKey) -> Result<&mut Backing> {
        self.find(key)
            .filter(|b| b.row.id.is_none() && b.row.stage != Stage::None)
            .ok_or_else(|| Error::try_again(format!("no space is reserved for the backing of {}", key.file)))
    }

    fn entry(&mut self, key: FileKey) -> Result<&mut Backing> {
        let at = match self.0.iter().position(|b| b.row.key == key) {
            Some(at) => at,
            None if key.file.len() > MAX_NAME => {
                return Err(Error::usage(format!(
                    "cannot make a backing for a file of template {}: its name has {} bytes, limit {MAX_NAME}",
                    key.digest,
                    key.file.len()
                )));
            }
            None if self.0.len() >= MAX_FILES => {
                return Err(Error::try_again(format!(
                    "the mount has reached its limit of {MAX_FILES} files with a backing or a reason for having none"
                )));
            }
            None => {
                let (id, descriptor, verified_at, why) = (None, None, None, None);
                let stage = Stage::None;
                let row = BackingRow {
                    key,
                    stage,
                    id,
                    descriptor,
                    identity: (0, 0),
                    reserved: 0,
                    filled: 0,
                    verified_at,
                    why,
                };
                self.0.push(Backing { row, file: None, proof: None });
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[at])
    }

    /// Drops unfinished backings after the death of the server that was making them; its successor makes them again.
    /// Keeps the reasons why files have no backing: a process whose open was refused for a reason repeats the lookup,
    /// and the successor must answer that lookup in the same way. Returns the files, to be closed.
    pub fn drop_unfinished(&mut self) -> Vec<OwnedFd> {
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

    /// Reserves space for a backing with `data` bytes of data.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if there would be too little space even after an
    /// eviction.
    pub fn reserve(&mut self, chosen: &Chosen, key: &FileKey, data: Bytes) -> Result<Reservation> {
        if let Some((id, why)) = self.find(key).and_then(|b| Some((b.row.id?, &b.row.why))) {
            return match why {
                None => Ok(Reservation::Ready(id)),
                Some(why) => Err(Error::failed(format!("the backing is damaged: {why}"))),
            };
        }
        if data > chosen.most {
            let error =
                format!("the backing needs {data}, but the maximum size of all backings is {}", chosen.most);
            return Err(Error::try_again(error).hint("mount with a larger --cache-size"));
        }
        let others: u64 = self.0.iter().filter(|b| b.row.key != *key).map(|b| b.row.reserved).sum();
        let mut excess = (others + data.get()).saturating_sub(chosen.most.get());
        if excess == 0 {
            let backing = self.entry(key.clone())?;
            backing.row.reserved = data.get();
            backing.row.stage = Stage::Room;
            return Ok(Reservation::Create);
        }
        let mut candidates: Vec<_> =
            self.0.iter().filter(|b| b.row.key != *key && b.row.id.is_some()).collect();
        candidates.sort_by_key(|b| b.row.reserved);
        let mut evict = Vec::new();
        for backing in candidates.into_iter().take(MAX_KEYS) {
            evict.push(backing.row.key.clone());
            excess = excess.saturating_sub(backing.row.reserved);
        }
        if excess > 0 || evict.is_empty() {
            let (taken, limit) = (Bytes::new(others), chosen.most);
            return Err(Error::try_again(format!(
                "the backing needs {data}, but {taken} of the cache's {limit} are in use"
            )));
        }
        Ok(Reservation::Evict(evict))
    }

    /// Records the empty file that was created for a backing.
    ///
    /// # Errors
    /// Returns an error if no space is reserved for the backing.
    pub fn created(&mut self, key: &FileKey, file: OwnedFd) -> Result<&OwnedFd> {
        let identity = fds::identity(&file)?;
        let backing = self.unfinished(key)?;
        backing.row.identity = identity;
        backing.row.stage = Stage::Room;
        Ok(backing.file.insert(file))
    }

    /// Returns the space that is reserved for a backing, which can then be frozen; `None` if the backing is already
    /// frozen.
    ///
    /// # Errors
    /// Returns an error if no file was created for the backing.
    pub fn reserved_for_freeze(&mut self, key: &FileKey) -> Result<Option<Bytes>> {
        let backing = self.unfinished(key)?;
        match (backing.row.stage, &backing.file) {
            (Stage::Frozen, _) => Ok(None),
            (_, Some(_)) => Ok(Some(Bytes::new(backing.row.reserved))),
            (_, None) => Err(Error::failed(format!("no file was created for the backing of {}", key.file))),
        }
    }

    /// Records that the file of a backing is immutable. For kernel decode, the file that the kernel decodes takes the
    /// place of the image, which the kernel holds.
    ///
    /// # Errors
    /// Returns an error if no file was created for the backing, or if the process is out of descriptors.
    pub fn frozen(&mut self, key: &FileKey, decoded: Option<Opened>) -> Result<Frozen> {
        let backing = self.unfinished(key)?;
        if let Some(Opened { file, proof, verified_at }) = decoded {
            backing.row.identity = fds::identity(&file)?;
            backing.file = Some(file);
            (backing.proof, backing.row.verified_at) = (Some(proof), verified_at);
        }
        backing.row.stage = Stage::Frozen;
        let file = backing.file.as_ref().ok_or_else(|| Error::failed("the file of the backing is closed"))?;
        Ok(Frozen { file: fds::copy(file)?, verified_at: backing.row.verified_at })
    }

    /// Checks that a backing may be registered: that its file is frozen and is the file with the identity `verified`.
    ///
    /// # Errors
    /// Returns an error if another file was verified, or if the file is not frozen.
    pub fn registration(&mut self, key: &FileKey, verified: (u64, u64)) -> Result<Registration> {
        // While an inode is open with a backing, the kernel fails opens of the inode with another backing id.
        if let Some(id) = self.find(key).and_then(|b| b.row.id) {
            return Ok(Registration::AlreadyRegistered(id));
        }
        let backing = self.unfinished(key)?;
        if backing.row.identity != verified || backing.file.is_none() {
            return Err(Error::failed("the verified file is not the file of the backing"));
        }
        match backing.row.stage {
            Stage::Frozen => Ok(Registration::Register),
            Stage::None | Stage::Room => Err(Error::failed("the backing is not frozen")),
        }
    }

    /// Records the id with which the kernel has registered a backing.
    pub fn note_registered(&mut self, key: &FileKey, id: u32) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.id = Some(id);
            backing.row.filled = backing.row.reserved;
            backing.row.why = None;
        }
    }

    /// Records when the blocks of a file were verified for kernel decode, in seconds since 1970.
    pub fn note_verified(&mut self, key: &FileKey, at: Option<u64>) {
        if let Some(backing) = self.find(key) {
            backing.row.verified_at = at;
        }
    }

    /// Records that a registered backing is damaged: no later server answers opens with it.
    pub fn withdraw(&mut self, key: &FileKey, reason: &str) {
        if let Some(backing) = self.find(key).filter(|backing| backing.row.id.is_some()) {
            backing.row.verified_at = None;
            backing.row.why = Some(bounded(reason));
        }
    }

    /// Returns the proof and the time of the verification of a registered backing, for the store to remember.
    pub fn verified(&self, key: &FileKey) -> Option<(Proof, u64)> {
        let backing = self.0.iter().find(|b| b.row.key == *key && b.row.id.is_some())?;
        backing.proof.zip(backing.row.verified_at)
    }

    /// Drops the reasons of the files of a removed template. Backings stay until they are closed.
    pub fn forget_reasons(&mut self, digest: &Digest) {
        let is_reason = |b: &Backing| b.row.id.is_none() && b.row.stage == Stage::None && b.file.is_none();
        self.0.retain(|b| b.row.key.digest != *digest || !is_reason(b));
    }

    /// Returns the files of a template that have a registered backing.
    pub fn keys_of(&self, digest: &Digest) -> Vec<FileKey> {
        let ready = self.0.iter().filter(|b| b.row.key.digest == *digest && b.row.id.is_some());
        ready.map(|b| b.row.key.clone()).collect()
    }

    /// Removes registered backings. The caller has made sure that no process uses them and that no server still answers
    /// opens with them. Returns their ids and files, to be closed.
    pub fn close(&mut self, keys: &[FileKey]) -> (Vec<u32>, Vec<OwnedFd>) {
        let closed = self.0.extract_if(.., |b| b.row.id.is_some() && keys.contains(&b.row.key));
        let (mut ids, mut files) = (Vec::new(), Vec::new());
        for backing in closed {
            ids.extend(backing.row.id);
            files.extend(backing.file);
        }
        (ids, files)
    }

    /// Records why a file has no backing; `None` clears the reason. If the reason is a timeout, the server continues to
    /// fill the backing.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if too many files have a backing or a reason, and
    /// [`Code::Usage`](stencilfs::error::Code::Usage) if the file name is too long.
    pub fn note_reason(&mut self, key: FileKey, reason: Option<String>) -> Result<()> {
        let backing = self.entry(key)?;
        if backing.row.id.is_none() {
            backing.row.why = reason.as_deref().map(bounded);
        }
        Ok(())
    }

    /// Frees the space of an unfinished backing. Returns its file, to be closed.
    pub fn abandon(&mut self, key: &FileKey) -> Option<OwnedFd> {
        let backing = self.unfinished(key).ok()?;
        (backing.row.stage, backing.row.reserved, backing.row.filled) = (Stage::None, 0, 0);
        backing.file.take()
    }

    /// Records how many bytes of data were written to a backing.
    pub fn note_progress(&mut self, key: &FileKey, bytes: u64) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.filled = backing.row.filled.max(bytes);
        }
    }
}

/// Returns a reason on one line, bounded because it occupies locked memory and space in the ledger.
fn bounded(reason: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    reason.chars().take(MAX_REASON).map(plain).collect()
}

fn copy_of(backing: Option<&Backing>) -> Result<OwnedFd> {
    let file = backing.and_then(|b| b.file.as_ref());
    fds::copy(file.ok_or_else(|| Error::not_found("the file has no registered backing"))?)
}

#[cfg(test)]
mod tests;
