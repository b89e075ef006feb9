//! The effect of `--store` on commands about processes and mounts: with the option, a command covers only those of that
//! store; without the option, those of every store.

use std::path::{Path, PathBuf};

use crate::cli::Global;
use crate::clones::registry::Entry;
use crate::control::{self, is_of_store};
use crate::error::{Error, Result};
use crate::store::Store;

/// The mounts and clones that a command works on.
pub enum StoreFilter {
    /// Mounts and clones of every store.
    All,
    /// Mounts and clones of this store.
    Store(Box<Store>),
    /// Mounts and clones of the store that was at this path. The store cannot be opened, but has a mount.
    Path(PathBuf),
}

impl StoreFilter {
    /// Creates the filter from the options and the environment of the command.
    ///
    /// # Errors
    /// Returns the error of opening the store ([`Code::NotFound`](crate::error::Code) if it does not exist), unless the
    /// store is mounted.
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

    /// Returns true for the store with this path and identity.
    pub fn has(&self, path: &Path, id: &str) -> bool {
        match self {
            StoreFilter::All => true,
            StoreFilter::Store(store) => is_of_store(path, id, store),
            StoreFilter::Path(ours) => path == ours,
        }
    }

    /// Returns true for a clone of the store.
    pub fn has_clone(&self, entry: &Entry) -> bool {
        self.has(&entry.store.path, &entry.store.id)
    }

    /// Checks that the clone is of the store.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code), with the clone's store, if the clone is of another store.
    pub fn expect(&self, entry: &Entry) -> Result<()> {
        if self.has_clone(entry) {
            return Ok(());
        }
        let (id, store) = (&entry.id, entry.store.path.display());
        Err(Error::not_found(format!("clone {id} is of store {store}, not of the given store"))
            .hint(format!("run stencil --store {store} …, or omit --store")))
    }
}
