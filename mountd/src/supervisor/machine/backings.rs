//! Backings of a mount. They belong to the FUSE connection, so the supervisor keeps them across restarts of servers.
//!
//! ```text
//!   reserved ──▶ created ──▶ (filled by the server) ──▶ frozen ──▶ (verified by the server) ──▶ registered ──▶ closed
//! ```
//! The server fills a backing with a copy of the file's bytes or, for kernel decode, with an image that tells the kernel
//! where the bytes are in the packs. The step to frozen then replaces the image by the file that the kernel decodes.
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
            let error = format!("the backing needs {data}, the cache may hold {}", chosen.most);
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
        // While an inode is open by passthrough, the kernel fails opens of the inode with another backing id.
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

    /// Returns what the store must remember of the verification of a registered backing: its proof and time, or `None`
    /// for a damaged backing. Returns `None` if the store need not change.
    pub fn verified(&self, key: &FileKey) -> Option<Option<(Proof, u64)>> {
        let backing = self.0.iter().find(|b| b.row.key == *key && b.row.id.is_some())?;
        match (backing.proof, backing.row.verified_at, &backing.row.why) {
            (_, _, Some(_)) => Some(None),
            (Some(proof), Some(at), None) => Some(Some((proof, at))),
            (_, _, None) => None,
        }
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
mod tests {
    use super::*;
    use stencilfs::control::{BackingKind, Cache};
    use stencilfs::error::Code;

    fn key(name: &str) -> FileKey {
        FileKey { digest: Digest::of(name.as_bytes()), file: "memory".into() }
    }

    fn cache(limit: u64) -> Chosen {
        Chosen { kind: BackingKind::Copy, cache: Cache::Memory, why: None, most: Bytes::new(limit) }
    }

    fn file() -> (OwnedFd, (u64, u64)) {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let identity = fds::identity(&file).unwrap();
        (file, identity)
    }

    fn ready(backings: &mut Backings, name: &str, bytes: u64, id: u32) {
        let key = key(name);
        assert_eq!(backings.reserve(&cache(u64::MAX), &key, Bytes::new(bytes)).unwrap(), Reservation::Create);
        let (file, identity) = file();
        backings.created(&key, file).unwrap();
        assert_eq!(backings.reserved_for_freeze(&key).unwrap(), Some(Bytes::new(bytes)));
        drop(backings.frozen(&key, None).unwrap());
        assert_eq!(backings.registration(&key, identity).unwrap(), Registration::Register);
        backings.note_registered(&key, id);
    }

    #[test]
    fn only_the_frozen_and_verified_file_is_registered() {
        let mut backings = Backings::default();
        let key = key("a");
        assert!(backings.registration(&key, (0, 0)).is_err(), "nothing is reserved");
        backings.reserve(&cache(100), &key, Bytes::new(10)).unwrap();
        assert!(backings.registration(&key, (0, 0)).is_err(), "no file");
        assert!(backings.reserved_for_freeze(&key).is_err(), "no file");
        let ((first, identity), (_second, other)) = (file(), file());
        backings.created(&key, first).unwrap();
        assert!(backings.registration(&key, identity).unwrap_err().to_string().contains("not frozen"));
        drop(backings.frozen(&key, None).unwrap());
        assert_eq!(backings.reserved_for_freeze(&key).unwrap(), None, "already frozen");
        assert!(backings.registration(&key, other).unwrap_err().to_string().contains("verified file is not"));
        assert!(backings.copy(&key).is_err(), "not registered");
        assert_eq!(backings.registration(&key, identity).unwrap(), Registration::Register);
        backings.note_registered(&key, 3);
        assert_eq!(backings.registration(&key, identity).unwrap(), Registration::AlreadyRegistered(3));
        assert_eq!(backings.reserve(&cache(100), &key, Bytes::new(10)).unwrap(), Reservation::Ready(3));
        assert!(backings.copy(&key).is_ok() && backings.copy_at(0).is_ok() && backings.copy_at(1).is_err());
    }

    #[test]
    fn a_reservation_evicts_small_backings_first() {
        let mut backings = Backings::default();
        ready(&mut backings, "a", 40, 1);
        ready(&mut backings, "b", 30, 2);
        let reserve =
            |backings: &mut Backings, bytes| backings.reserve(&cache(100), &key("c"), Bytes::new(bytes));
        assert_eq!(reserve(&mut backings, 30).unwrap(), Reservation::Create);
        backings.abandon(&key("c"));
        let evict = reserve(&mut backings, 60).unwrap();
        assert_eq!(evict, Reservation::Evict(vec![key("b"), key("a")]), "smallest first");
        assert_eq!(reserve(&mut backings, 101).unwrap_err().code(), Code::TryAgain);
        let unfinished = backings.reserve(&cache(100), &key("d"), Bytes::new(30)).unwrap();
        assert_eq!(unfinished, Reservation::Create);
        assert_eq!(
            reserve(&mut backings, 90).unwrap_err().code(),
            Code::TryAgain,
            "unfinished backings cannot be evicted"
        );
    }

    #[test]
    fn registered_backings_and_reasons_survive_the_death_of_a_server() {
        let mut backings = Backings::default();
        ready(&mut backings, "a", 1, 1);
        backings.reserve(&cache(100), &key("b"), Bytes::new(5)).unwrap();
        backings.created(&key("b"), file().0).unwrap();
        backings.note_reason(key("c"), Some("too\nlate".into())).unwrap();
        backings.reserve(&cache(100), &key("c"), Bytes::new(5)).unwrap();
        backings.created(&key("c"), file().0).unwrap();
        assert_eq!(backings.drop_unfinished().len(), 2);
        let rows = backings.rows();
        assert_eq!(rows.iter().map(|row| row.key.clone()).collect::<Vec<_>>(), [key("a"), key("c")]);
        assert_eq!(
            (rows[1].stage, rows[1].reserved, rows[1].why.as_deref()),
            (Stage::None, 0, Some("too late"))
        );
        assert_eq!(backings.files().count(), 1);
    }

    #[test]
    fn closing_removes_registered_backings_only() {
        let mut backings = Backings::default();
        ready(&mut backings, "a", 1, 7);
        backings.reserve(&cache(100), &key("b"), Bytes::new(5)).unwrap();
        assert_eq!(backings.keys_of(&key("a").digest), [key("a")]);
        assert!(backings.keys_of(&key("b").digest).is_empty());
        let (ids, files) = backings.close(&[key("a"), key("b"), key("c")]);
        assert_eq!((ids, files.len(), backings.rows().len()), (vec![7], 1, 1));
    }

    #[test]
    fn names_reasons_and_files_are_bounded() {
        let mut backings = Backings::default();
        let long = FileKey { file: "x".repeat(MAX_NAME + 1), ..key("a") };
        assert_eq!(backings.note_reason(long, None).unwrap_err().code(), Code::Usage);
        backings.note_reason(key("a"), Some("x".repeat(MAX_REASON * 2))).unwrap();
        assert_eq!(backings.rows()[0].why.as_ref().map(String::len), Some(MAX_REASON));
        for number in 1..MAX_FILES {
            backings.note_reason(key(&number.to_string()), None).unwrap();
        }
        assert_eq!(backings.note_reason(key("one more"), None).unwrap_err().code(), Code::TryAgain);
    }

    #[test]
    fn progress_never_decreases_and_is_complete_after_registration() {
        let mut backings = Backings::default();
        backings.reserve(&cache(100), &key("a"), Bytes::new(50)).unwrap();
        for (report, expected) in [(20, 20), (10, 20), (30, 30)] {
            backings.note_progress(&key("a"), report);
            assert_eq!(backings.rows()[0].filled, expected);
        }
        ready(&mut backings, "b", 50, 1);
        assert_eq!(backings.rows()[1].filled, 50);
    }

    #[test]
    fn backings_are_restored_with_their_files() {
        let mut backings = Backings::default();
        ready(&mut backings, "a", 1, 7);
        let restored = Backings::restore(backings.rows(), |row| backings.copy(&row.key).ok());
        assert_eq!(restored.registered().map(|(id, _)| id).collect::<Vec<_>>(), [7]);
    }
}
