//! Measures how much of each backing is in the page cache, through the processes that have the backings open.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::client::{ask, unexpected};
use super::registry::Mount;
use super::status::Residency;
use crate::control::ledger;
use crate::control::protocol::messages::{Request, Response};
use crate::control::protocol::snapshot::{BackingKind, BackingRow, Snapshot};
use crate::error::{Code, Error, Result};
use crate::sys::fuse::control_fs::Waiting;
use crate::sys::memory::cachestat;
use crate::sys::process::tasks;
use crate::units::Bytes;

/// How often the measurement is repeated if the list of backings changes meanwhile.
const ATTEMPTS: u32 = 20;
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

impl Mount {
    /// Returns how many bytes of each backing are in the page cache. Only the supervisor and the server have the
    /// backings open.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`] if the list of backings cannot be read or keeps changing, and an error if the
    /// supervisor does not reply or the kernel cannot report the page cache.
    pub fn residency(&self) -> Result<Vec<Residency>> {
        let mut files = match self.orphaned {
            // The page cache of a backing without a process that has it open cannot be measured.
            true if self.is_dead() => Vec::new(),
            // The mount has ended. Its record is kept, because this process cannot know whether the PID namespace of
            // the record has ended too.
            true if self.foreign && self.is_over() => Vec::new(),
            true => self.read_through_server()?,
            false => self.read_through_supervisor()?,
        };
        files.sort_by(|a, b| (a.digest, &a.file).cmp(&(b.digest, &b.file)));
        Ok(files)
    }

    /// Returns true if the kernel no longer has the mount's FUSE connection.
    fn is_over(&self) -> bool {
        Waiting::of(self.device).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    }

    fn read_through_supervisor(&self) -> Result<Vec<Residency>> {
        for _ in 0..ATTEMPTS {
            if let Some(files) = self.try_read_through_supervisor()? {
                return Ok(files);
            }
            sleep(RETRY_INTERVAL);
        }
        Err(Error::try_again(format!(
            "the list of backings changed during each of {ATTEMPTS} attempts to read it"
        ))
        .at(&self.mountpoint)
        .hint("retry when fewer templates are being opened and closed"))
    }

    /// Returns `None` if the list of backings changes meanwhile: a request names a backing by its index only.
    fn try_read_through_supervisor(&self) -> Result<Option<Vec<Residency>>> {
        let mut files = Vec::new();
        let snapshot = self.snapshot()?;
        let kind = snapshot.chosen.kind;
        for (index, row) in snapshot.backings.into_iter().enumerate() {
            if row.id.is_none() {
                continue;
            }
            match ask(&self.dir, &Request::Backing { index }) {
                Ok((Response::Descriptor, Some(backing))) => {
                    let backing = File::from(backing);
                    if identity(&backing) != Some(row.identity) {
                        return Ok(None);
                    }
                    files.push(resident(kind, row, &backing)?);
                }
                Ok((other, _)) => return Err(unexpected(&other)),
                Err(error) if error.code() == Code::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(files))
    }

    /// Reads ledger and backings through the server, which still has them open when the supervisor is dead.
    fn read_through_server(&self) -> Result<Vec<Residency>> {
        let unknown = || {
            Error::try_again("cannot measure the mount's page cache: the supervisor is dead, and its files cannot be read through the \
                 server")
                .at(&self.mountpoint)
                .hint(match self.foreign {
                    true => {
                        format!(
                            "the mount is of another PID namespace; if that namespace no longer exists, remove {}",
                            self.dir.display()
                        )
                    }
                    false => format!(
                        "run 'stencil mount {}' to start another supervisor",
                        self.mountpoint.display()
                    ),
                })
        };
        let held = self.server_pid.map(open_files).unwrap_or_default();
        // The descriptor may have been closed and its number reused since.
        let open = |expected: (u64, u64)| {
            let file = held.get(&expected).and_then(|path| File::open(path).ok());
            file.filter(|file| identity(file) == Some(expected)).ok_or_else(unknown)
        };
        let [ledger, _] = self.identities;
        let (_, text) = ledger::newest(&open(ledger)?).ok_or_else(unknown)?;
        let snapshot: Snapshot =
            serde_json::from_slice(&text).map_err(|error| unknown().because(error.into()))?;
        let kind = snapshot.chosen.kind;
        let ready = snapshot.backings.into_iter().filter(|row| row.id.is_some());
        ready.map(|row| open(row.identity).and_then(|backing| resident(kind, row, &backing))).collect()
    }
}

/// Returns the open files of a process, by `st_dev` and `st_ino`, each with a path in `/proc` that opens it.
fn open_files(pid: u32) -> HashMap<(u64, u64), PathBuf> {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| fs::read_dir(thread.join("fd")));
    let paths = entries.flatten().flatten().map(|entry| entry.path());
    paths.filter_map(|path| fs::metadata(&path).ok().map(|its| ((its.dev(), its.ino()), path))).collect()
}

fn identity(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|its| (its.dev(), its.ino()))
}

fn resident(kind: BackingKind, row: BackingRow, backing: impl AsFd) -> Result<Residency> {
    let resident_bytes = cachestat::cached(backing)?.bytes();
    let metadata_bytes = match kind {
        BackingKind::Copy => Bytes::ZERO,
        BackingKind::Kernel => Bytes::new(row.reserved),
    };
    Ok(Residency { kind, digest: row.key.digest, file: row.key.file, resident_bytes, metadata_bytes })
}
