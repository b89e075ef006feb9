//! What `--store` means for commands about processes and mounts: only that store's; without it those of every store.

use std::path::{Path, PathBuf};

use super::Global;
use crate::clones::registry::Entry;
use crate::control::{self, is_of_store};
use crate::error::{Code, Error, Result};
use crate::store::Store;

/// Which mounts and clones a command is about.
pub enum StoreFilter {
    /// Those of every store.
    All,
    /// Those of this store.
    Store(Box<Store>),
    /// Those of the store that was at this path; it is away or damaged, and a mount of it lives.
    Path(PathBuf),
}

impl StoreFilter {
    /// As the call or the environment says.
    ///
    /// # Errors
    /// [`Code::NotFound`] for a store that is not there, unless it is mounted.
    pub fn of(global: &Global) -> Result<StoreFilter> {
        if !global.names_store {
            return Ok(StoreFilter::All);
        }
        let error = match Store::open(&global.store) {
            Ok(store) => return Ok(StoreFilter::Store(Box::new(store))),
            Err(error) => error,
        };
        let named = std::path::absolute(&global.store).unwrap_or_else(|_| global.store.clone());
        let path = std::fs::canonicalize(&named).unwrap_or(named);
        let listing = control::list()?;
        let mut served = listing.mounts.iter().map(|m| &m.store).chain(listing.dead.iter().map(|m| &m.store));
        match served.any(|store| *store == path) {
            true => Ok(StoreFilter::Path(path)),
            false => Err(error),
        }
    }

    /// True for the store with this path and identity.
    pub fn has(&self, path: &Path, id: Option<&str>) -> bool {
        match self {
            StoreFilter::All => true,
            StoreFilter::Store(store) => is_of_store(path, id, store),
            StoreFilter::Path(ours) => path == ours,
        }
    }

    /// True for a clone of the store. One of a build that did not write down its store is of no named store.
    pub fn has_clone(&self, entry: &Entry) -> bool {
        match (&entry.store, self) {
            (_, StoreFilter::All) => true,
            (Some(store), _) => self.has(&store.path, Some(&store.id)),
            (None, _) => false,
        }
    }

    /// Fails for a clone of another store.
    ///
    /// # Errors
    /// [`Code::NotFound`] that names its store.
    pub fn expect(&self, entry: &Entry) -> Result<()> {
        if self.has_clone(entry) {
            return Ok(());
        }
        let (of, remedy) = match &entry.store {
            Some(store) => (
                format!("store {}", store.path.display()),
                format!("name that store: stencil --store {} …; or none", store.path.display()),
            ),
            None => ("an unknown store".to_owned(), "name no store".to_owned()),
        };
        Err(Error::new(
            Code::NotFound,
            format!("clone {} is of {of}, not of the store that was named", entry.id),
        )
        .remedy(remedy))
    }
}
