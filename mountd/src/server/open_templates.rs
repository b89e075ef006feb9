//! Templates that are kept open: two descriptors and two mappings each, so no more than a fixed number of them.

use std::collections::HashSet;
use std::sync::Arc;

use dashmap::DashMap;
use rustix::process::{Resource, getrlimit};
use stencilfs::error::Result;
use stencilfs::store::{Digest, Store, Template};

/// No more are kept, whatever the limit of open files.
const MOST: u64 = 1024;
/// So many are kept, however low it is.
const FEWEST: u64 = 64;
/// Descriptors that others need: packs of the store (512), backings, the connection.
const OTHERS: u64 = 1024;

/// How many templates may be kept open under the limit of open files, which the supervisor has raised.
pub fn most_open() -> usize {
    kept_under(getrlimit(Resource::Nofile).current)
}

fn kept_under(descriptors: Option<u64>) -> usize {
    let room = descriptors.unwrap_or(u64::MAX).saturating_sub(OTHERS) / 2;
    room.clamp(FEWEST, MOST) as usize
}

/// The open templates of a store.
#[derive(Debug)]
pub struct OpenTemplates {
    most: usize,
    open: DashMap<Digest, Arc<Template>>,
    /// Names of the files of every template that was open: inode numbers are made of them, also when it cannot be opened.
    names: DashMap<Digest, Arc<[String]>>,
}

impl OpenTemplates {
    /// None yet, and never more than so many.
    pub fn new(most: usize) -> OpenTemplates {
        OpenTemplates { most: most.max(1), open: DashMap::new(), names: DashMap::new() }
    }

    /// An open template.
    ///
    /// # Errors
    /// What the store says.
    pub fn get(&self, store: &Store, digest: &Digest) -> Result<Arc<Template>> {
        match self.open.get(digest) {
            Some(template) => Ok(Arc::clone(&template)),
            None => self.reopen(store, digest),
        }
    }

    /// Opens a template anew.
    ///
    /// # Errors
    /// What the store says.
    pub fn reopen(&self, store: &Store, digest: &Digest) -> Result<Arc<Template>> {
        let template = Arc::new(store.template(digest)?);
        if !self.names.contains_key(digest) {
            let names = template.files().iter().map(|f| f.name.clone()).collect();
            self.names.insert(*digest, names);
        }
        self.open.insert(*digest, Arc::clone(&template));
        while self.open.len() > self.most {
            // Any other will do: it is opened again at its next use, and who reads it goes on.
            let victim = self.open.iter().map(|entry| *entry.key()).find(|key| key != digest);
            let Some(victim) = victim else { break };
            self.open.remove(&victim);
        }
        Ok(template)
    }

    /// The name of a file of a template that was open once.
    pub fn name(&self, digest: &Digest, file: usize) -> Option<String> {
        self.names.get(digest).and_then(|names| names.get(file).cloned())
    }

    /// Closes all; their names stay known.
    pub fn close(&self) {
        self.open.clear();
    }

    /// Forgets all templates but these.
    pub fn retain(&self, digests: &HashSet<Digest>) {
        self.names.retain(|digest, _| digests.contains(digest));
        self.open.retain(|digest, _| digests.contains(digest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_fits_the_limit_of_open_files() {
        assert_eq!(kept_under(Some(1024)), 64);
        assert_eq!(kept_under(Some(2048)), 512);
        assert_eq!(kept_under(Some(1 << 20)), 1024);
        assert_eq!(kept_under(None), 1024);
    }
}
