//! How much of each passthrough backing is in the page cache, as those say who have them open.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::client::{ask, unexpected};
use super::ledger;
use super::protocol::{Request, Response};
use super::registry::Mount;
use super::snapshot::{BackingRow, Snapshot};
use super::status::Residency;
use crate::error::{Code, Error, Result};
use crate::sys::fusectl::Waiting;
use crate::sys::{cachestat, tasks};

/// How often a list of backings that changes is begun anew, and after which time.
const TRIES: u32 = 20;
const MOMENT: Duration = Duration::from_millis(20);

impl Mount {
    /// How much of each passthrough backing is in the page cache. Only the supervisor has them open, and the server.
    ///
    /// # Errors
    /// When the supervisor does not answer, or the kernel cannot say; [`Code::TryAgain`] where it is not known which
    /// backings there are.
    pub fn residency(&self) -> Result<Vec<Residency>> {
        let mut files = match self.orphaned {
            // The record of a PID namespace that has ended is left for those who know of it.
            true if self.foreign && self.is_over() => Vec::new(),
            true => self.as_the_server_has_them()?,
            false => self.as_supervised()?,
        };
        files.sort_by(|a, b| (a.digest, &a.file).cmp(&(b.digest, &b.file)));
        Ok(files)
    }

    /// True when the kernel has no such connection any more.
    fn is_over(&self) -> bool {
        Waiting::of(self.device).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    }

    fn as_supervised(&self) -> Result<Vec<Residency>> {
        for _ in 0..TRIES {
            if let Some(files) = self.at_one_time()? {
                return Ok(files);
            }
            sleep(MOMENT);
        }
        Err(Error::try_again("the backings of the mount were others each time they were looked at")
            .at(&self.mountpoint)
            .remedy("run it again when fewer templates come and go"))
    }

    /// `None` when the list has changed meanwhile: the supervisor is asked for a place in it, and gives whatever is there.
    fn at_one_time(&self) -> Result<Option<Vec<Residency>>> {
        let mut files = Vec::new();
        for (index, row) in self.snapshot()?.backings.into_iter().enumerate() {
            if row.id.is_none() {
                continue;
            }
            match ask(&self.dir, &Request::Backing { index }) {
                Ok((Response::Descriptor, Some(backing))) => {
                    let backing = File::from(backing);
                    if identity(&backing) != Some(row.identity) {
                        return Ok(None);
                    }
                    files.push(resident(row, &backing)?);
                }
                Ok((other, _)) => return Err(unexpected(&other)),
                Err(error) if error.code() == Code::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(files))
    }

    /// With the supervisor dead its server still has the ledger and the backings.
    fn as_the_server_has_them(&self) -> Result<Vec<Residency>> {
        let unknown = || {
            Error::try_again("the mount has lost its supervisor: what it has in RAM cannot be known")
                .at(&self.mountpoint)
                .remedy(match self.foreign {
                    true => {
                        format!(
                            "it is of another PID namespace; if nobody lives there, remove {}",
                            self.dir.display()
                        )
                    }
                    false => format!("give it another one: stencil mount {}", self.mountpoint.display()),
                })
        };
        let held = self.server_pid.map(held_by).unwrap_or_default();
        // The number may lead elsewhere by now.
        let open = |known: (u64, u64)| {
            let file = held.get(&known).and_then(|path| File::open(path).ok());
            file.filter(|file| identity(file) == Some(known)).ok_or_else(unknown)
        };
        let [ledger, _] = self.identities;
        let (_, text) = ledger::newest(&open(ledger)?).ok_or_else(unknown)?;
        let snapshot: Snapshot =
            serde_json::from_slice(&text).map_err(|error| unknown().because(error.into()))?;
        let ready = snapshot.backings.into_iter().filter(|row| row.id.is_some());
        ready.map(|row| open(row.identity).and_then(|backing| resident(row, &backing))).collect()
    }
}

/// The files that a process has open, by `st_dev` and `st_ino`, with a path that opens them.
fn held_by(pid: u32) -> HashMap<(u64, u64), PathBuf> {
    let tables = tasks::file_tables(pid).unwrap_or_default();
    let entries = tables.iter().flat_map(|thread| fs::read_dir(thread.join("fd")));
    let paths = entries.flatten().flatten().map(|entry| entry.path());
    paths.filter_map(|path| fs::metadata(&path).ok().map(|its| ((its.dev(), its.ino()), path))).collect()
}

fn identity(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|its| (its.dev(), its.ino()))
}

fn resident(row: BackingRow, backing: impl AsFd) -> Result<Residency> {
    let resident_bytes = cachestat::cached(backing)?.bytes();
    Ok(Residency { digest: row.key.digest, file: row.key.file, resident_bytes })
}
