//! The exit records of clones, which the watchdog of their launch writes: a file in the clone's directory. That of a
//! simulated clone is a line in the record of its launch.

use std::io;
use std::path::PathBuf;

use super::ending::Ending;
use super::entry::{Entry, Kind};
use super::layout::CLONES;
use super::shared_record;
use crate::control::runtime::{self, MAX_RECORD, trusted_folder};

const ENDING: &str = "ending.json";

/// Writes the exit records of clones of one launch, and goes on after an error.
///
/// # Errors
/// Returns the last error: a directory of a clone does not exist, or cannot be written.
pub fn save_endings(ended: impl IntoIterator<Item = (Entry, Ending)>) -> io::Result<()> {
    let (mut shared, mut result) = (None::<(PathBuf, Vec<(u32, Ending)>)>, Ok(()));
    for (entry, ending) in ended {
        if entry.kind == Kind::Simulated {
            shared.get_or_insert_with(|| (entry.dir, vec![])).1.push((entry.index, ending));
        } else {
            result = save(&entry, ending).and(result);
        }
    }
    let Some((directory, endings)) = shared else { return result };
    shared_record::save_endings(&directory, &endings).map_err(io::Error::other).and(result)
}

fn save(entry: &Entry, ending: Ending) -> io::Result<()> {
    let all = runtime::open(CLONES).map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
    let directory = trusted_folder(&all, &entry.id)?;
    runtime::replace(&directory, ENDING, &serde_json::to_vec(&ending)?)
}

impl Ending {
    /// Reads the exit record of a clone. Returns `None` if the clone is alive or has no exit record.
    pub fn of(entry: &Entry) -> Option<Ending> {
        if entry.kind == Kind::Simulated {
            return entry.ending;
        }
        let all = runtime::open(CLONES).ok()??;
        let directory = trusted_folder(&all, &entry.id).ok()?;
        let text = runtime::read(&directory, ENDING, MAX_RECORD).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|e| log::warn!("{}: {e}", directory.path_of(ENDING).display()))
            .ok()
    }
}
