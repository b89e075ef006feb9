//! A cache of open templates. Each has two descriptors and two mappings, so their number is limited.

use std::collections::HashSet;
use std::sync::Arc;

use dashmap::DashMap;
use rustix::process::{Resource, getrlimit};
use stencilfs::error::Result;
use stencilfs::store::{Digest, Store, Template};

/// Largest number of open templates, even if the limit on open files is higher.
const MAX_OPEN: u64 = 1024;
/// Number of templates that may be open, even if the limit on open files is lower.
const MIN_OPEN: u64 = 64;
/// Descriptors for other purposes: packs of the store (512), backings, the connection.
const OTHER_DESCRIPTORS: u64 = 1024;

/// Returns the number of templates that may be open with the limit on open files, which the supervisor has raised.
pub fn max_open() -> usize {
    open_under(getrlimit(Resource::Nofile).current)
}

fn open_under(descriptors: Option<u64>) -> usize {
    let room = descriptors.unwrap_or(u64::MAX).saturating_sub(OTHER_DESCRIPTORS) / 2;
    room.clamp(MIN_OPEN, MAX_OPEN) as usize
}

/// Open templates of a store.
#[derive(Debug)]
pub struct OpenTemplates {
    max_open: usize,
    open: DashMap<Digest, Arc<Template>>,
    /// Names of the files of all templates that were ever open: inode numbers are computed from them even if the
    /// template can no longer be opened.
    names: DashMap<Digest, Arc<[String]>>,
}

impl OpenTemplates {
    /// Creates an empty cache of at most `max_open` templates.
    pub fn new(max_open: usize) -> OpenTemplates {
        OpenTemplates { max_open: max_open.max(1), open: DashMap::new(), names: DashMap::new() }
    }

    /// Returns an open template; opens it if necessary.
    ///
    /// # Errors
    /// Returns the error of the store.
    pub fn get(&self, store: &Store, digest: &Digest) -> Result<Arc<Template>> {
        match self.open.get(digest) {
            Some(template) => Ok(Arc::clone(&template)),
            None => self.open(store, digest),
        }
    }

    fn open(&self, store: &Store, digest: &Digest) -> Result<Arc<Template>> {
        let template = Arc::new(store.template(digest)?);
        if !self.names.contains_key(digest) {
            let names = template.files().iter().map(|f| f.name.clone()).collect();
            self.names.insert(*digest, names);
        }
        self.open.insert(*digest, Arc::clone(&template));
        while self.open.len() > self.max_open {
            // Drops another template from the cache. Current readers hold a reference, and later readers open the
            // template again.
            let victim = self.open.iter().map(|entry| *entry.key()).find(|key| key != digest);
            let Some(victim) = victim else { break };
            self.open.remove(&victim);
        }
        Ok(template)
    }

    /// Returns the name of a file of a template that was open before.
    pub fn name(&self, digest: &Digest, file: usize) -> Option<String> {
        self.names.get(digest).and_then(|names| names.get(file).cloned())
    }

    /// Closes all templates, but keeps the names of their files.
    pub fn close(&self) {
        self.open.clear();
    }

    /// Removes all templates except `digests`.
    pub fn retain(&self, digests: &HashSet<Digest>) {
        self.names.retain(|digest, _| digests.contains(digest));
        self.open.retain(|digest, _| digests.contains(digest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_open_templates_fits_the_limit_on_open_files() {
        assert_eq!(open_under(Some(1024)), 64);
        assert_eq!(open_under(Some(2048)), 512);
        assert_eq!(open_under(Some(1 << 20)), 1024);
        assert_eq!(open_under(None), 1024);
    }
}
