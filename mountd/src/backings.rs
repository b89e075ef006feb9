//! The backings of a mount. They belong to the connection: the supervisor keeps them while servers come and go.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use stencilfs::control::{BackingRow, Chosen, FileKey, Stage};
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;
use stencilfs::sys::fuse_dev;
use stencilfs::units::Bytes;

use crate::kept;
use crate::link::{Answer, MOST_KEYS};

/// Most files that a mount keeps a backing, or a reason for none, for.
const MOST: usize = 4096;
/// Longest name of a file, in bytes: what a name in a directory can have.
const MOST_NAME: usize = 255;
/// Longest reason, in characters.
const MOST_WORDS: usize = 400;

/// One of them.
#[derive(Debug)]
pub struct Backing {
    /// What is known of it.
    pub row: BackingRow,
    /// The file, once it is made.
    pub file: Option<OwnedFd>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Backings(Vec<Backing>);

impl Backings {
    /// Those of another supervisor; `file` finds the descriptor of a row.
    pub fn restore(rows: Vec<BackingRow>, mut file: impl FnMut(&BackingRow) -> Option<OwnedFd>) -> Backings {
        Backings(rows.into_iter().map(|row| Backing { file: file(&row), row }).collect())
    }

    /// All rows, with the numbers of their descriptors here.
    pub fn rows(&self) -> Vec<BackingRow> {
        let number = |b: &Backing| b.file.as_ref().map(AsRawFd::as_raw_fd);
        self.0.iter().map(|b| BackingRow { descriptor: number(b), ..b.row.clone() }).collect()
    }

    /// Descriptors of all, those that are being made included.
    pub fn all_files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.0.iter().filter_map(|b| b.file.as_ref())
    }

    /// Descriptors of those that are ready.
    pub fn files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.ready().map(|(_, file)| file)
    }

    /// The descriptor of the ready one at that place of [`rows`](Self::rows).
    ///
    /// # Errors
    /// Not found when there is none.
    pub fn file(&self, index: usize) -> Result<&OwnedFd> {
        let backing = self.0.get(index).filter(|b| b.row.id.is_some());
        backing.and_then(|b| b.file.as_ref()).ok_or_else(|| Error::not_found("no such backing"))
    }

    /// The ids of those that are ready, with their descriptors.
    pub fn ready(&self) -> impl Iterator<Item = (u32, &OwnedFd)> {
        self.0.iter().filter_map(|b| Some((b.row.id?, b.file.as_ref()?)))
    }

    /// A copy of the descriptor of a file's ready backing.
    ///
    /// # Errors
    /// When there is none, or the process is out of descriptors.
    pub fn copy(&self, key: &FileKey) -> Result<OwnedFd> {
        let backing = self.0.iter().find(|b| b.row.key == *key && b.row.id.is_some());
        let file =
            backing.and_then(|b| b.file.as_ref()).ok_or_else(|| Error::not_found("no such backing"))?;
        kept::copy(file)
    }

    /// The id of a file's backing.
    pub fn id(&self, key: &FileKey) -> Option<u32> {
        self.0.iter().find(|b| b.row.key == *key)?.row.id
    }

    fn find(&mut self, key: &FileKey) -> Option<&mut Backing> {
        self.0.iter_mut().find(|b| b.row.key == *key)
    }

    fn unfinished(&mut self, key: &FileKey) -> Result<&mut Backing> {
        self.find(key)
            .filter(|b| b.row.id.is_none() && b.row.stage != Stage::None)
            .ok_or_else(|| Error::failed("no room was set aside for that backing"))
    }

    fn entry(&mut self, key: FileKey) -> Result<&mut Backing> {
        let at = match self.0.iter().position(|b| b.row.key == key) {
            Some(at) => at,
            None if key.file.len() > MOST_NAME => {
                return Err(Error::usage(format!("the name of a file has {} bytes", key.file.len())));
            }
            None if self.0.len() >= MOST => {
                return Err(Error::try_again(format!("the mount keeps backings for {MOST} files, no more")));
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

    /// A server has died: what it was making is gone with it, and its successor makes it anew. Why files are served
    /// without a backing stays: an open that was told so looks up the name again, and the successor must know.
    /// Gives the half-made files, to be closed.
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

    /// Sets room aside ([`Answer::Room`]), or names the backings that would have to go. A backing that became ready
    /// while another server served is given as it is ([`Answer::Backing`]).
    ///
    /// # Errors
    /// [`Code::TryAgain`](stencilfs::error::Code::TryAgain) when it can never fit.
    pub fn reserve(&mut self, chosen: &Chosen, key: &FileKey, bytes: u64) -> Result<Answer> {
        if let Some(id) = self.id(key) {
            return Ok(Answer::Backing(id));
        }
        let needs = format!("its backing needs {}", Bytes::new(bytes));
        if bytes > chosen.most.get() {
            return Err(Error::try_again(format!("{needs}, the cache may hold {}", chosen.most))
                .remedy("mount with a larger --cache-size"));
        }
        let others: u64 = self.0.iter().filter(|b| b.row.key != *key).map(|b| b.row.reserved).sum();
        let mut excess = (others + bytes).saturating_sub(chosen.most.get());
        if excess == 0 {
            let backing = self.entry(key.clone())?;
            backing.row.reserved = bytes;
            backing.row.stage = Stage::Room;
            return Ok(Answer::Room);
        }
        let mut candidates: Vec<_> =
            self.0.iter().filter(|b| b.row.key != *key && b.row.id.is_some()).collect();
        candidates.sort_by_key(|b| b.row.reserved);
        let mut leave = Vec::new();
        for backing in candidates.into_iter().take(MOST_KEYS) {
            leave.push(backing.row.key.clone());
            excess = excess.saturating_sub(backing.row.reserved);
        }
        if excess > 0 || leave.is_empty() {
            let taken = Bytes::new(others);
            return Err(Error::try_again(format!(
                "{needs}, of the cache's {} {taken} are taken",
                chosen.most
            )));
        }
        Ok(Answer::Evict(leave))
    }

    /// Takes the empty file that was made for a backing.
    ///
    /// # Errors
    /// When no room was set aside for it.
    pub fn made(&mut self, key: &FileKey, file: OwnedFd) -> Result<&OwnedFd> {
        let identity = kept::identity(&file)?;
        let backing = self.unfinished(key)?;
        backing.row.identity = identity;
        backing.row.stage = Stage::Room;
        Ok(backing.file.insert(file))
    }

    /// What is to be frozen, and the room that was set aside for it; none when it is frozen.
    ///
    /// # Errors
    /// When no file was made for it.
    pub fn filled(&mut self, key: &FileKey) -> Result<Option<(&OwnedFd, Bytes)>> {
        let backing = self.unfinished(key)?;
        if backing.row.stage == Stage::Frozen {
            return Ok(None);
        }
        let file = backing.file.as_ref().ok_or_else(|| Error::failed("no file was made for that backing"))?;
        Ok(Some((file, Bytes::new(backing.row.reserved))))
    }

    /// Notes that it is frozen.
    pub fn frozen(&mut self, key: &FileKey) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.stage = Stage::Frozen;
        }
    }

    /// Registers a frozen backing, whose content the server has compared, with the connection.
    ///
    /// # Errors
    /// The kernel's, or when it was not frozen.
    pub fn register(&mut self, fuse: &OwnedFd, key: &FileKey, compared: (u64, u64)) -> Result<u32> {
        // A question may come twice: a second id for an inode in use would be an error for its openers.
        if let Some(id) = self.find(key).and_then(|b| b.row.id) {
            return Ok(id);
        }
        let backing = self.unfinished(key)?;
        if backing.row.identity != compared {
            return Err(Error::failed("another file was compared than was made for that backing"));
        }
        let file = backing.file.as_ref().filter(|_| backing.row.stage == Stage::Frozen);
        let file = file.ok_or_else(|| Error::failed("that backing is not frozen"))?;
        let id = fuse_dev::backing_open(fuse, file.as_fd()).map_err(|e| {
            let stacked = e.raw_os_error() == Some(libc::ELOOP);
            let error = Error::failed("the kernel does not accept the backing").because(e);
            if stacked { error.remedy("name a directory on ext4 or xfs with --cache-dir") } else { error }
        })?;
        backing.row.id = Some(id);
        backing.row.filled = backing.row.reserved;
        backing.row.why = None;
        Ok(id)
    }

    /// The files of a template that have a ready backing.
    pub fn keys_of(&self, digest: &Digest) -> Vec<FileKey> {
        let ready = self.0.iter().filter(|b| b.row.key.digest == *digest && b.row.id.is_some());
        ready.map(|b| b.row.key.clone()).collect()
    }

    /// As [`close`](Self::close), and gives the files, to be closed elsewhere.
    pub fn close_with_files(&mut self, fuse: &OwnedFd, keys: &[FileKey]) -> Vec<OwnedFd> {
        let wanted = |b: &&mut Backing| keys.contains(&b.row.key);
        let files = self.0.iter_mut().filter(wanted).filter_map(|b| b.file.take()).collect();
        self.close(fuse, keys);
        files
    }

    /// Closes backings that nobody uses and nobody is handed any more.
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
                // The server that asked has the file open too: giving back its room is not waited for here.
                false
            }
            _ => true,
        });
    }

    /// Notes why a file has no backing, or that one is tried. One that is late goes on being filled.
    ///
    /// # Errors
    /// When too many files have one.
    pub fn decode(&mut self, key: FileKey, why: Option<String>) -> Result<()> {
        let backing = self.entry(key)?;
        if backing.row.id.is_none() {
            // It stays in locked memory, and in the ledger.
            let plain = |c: char| if c.is_control() { ' ' } else { c };
            backing.row.why = why.map(|why| why.chars().take(MOST_WORDS).map(plain).collect());
        }
        Ok(())
    }

    /// Gives back the room of a backing that is given up, and its file, to be closed.
    pub fn give_back(&mut self, key: &FileKey) -> Option<OwnedFd> {
        let backing = self.unfinished(key).ok()?;
        (backing.row.stage, backing.row.reserved, backing.row.filled) = (Stage::None, 0, 0);
        backing.file.take()
    }

    /// Notes how far one is filled.
    pub fn progress(&mut self, key: &FileKey, bytes: u64) {
        if let Ok(backing) = self.unfinished(key) {
            backing.row.filled = backing.row.filled.max(bytes);
        }
    }
}
