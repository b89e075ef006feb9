//! Who uses files of a mount that no template explains: a template that does not open may be one of theirs.
//!
//! The names of its files are in its image, and its inode numbers follow from them. Without the image these numbers are
//! not known, but those of everything else in the store are.

use std::collections::{BTreeMap, HashSet};

use super::find::Search;
use crate::control::Mount;
use crate::error::Result;
use crate::store::{MANIFEST, Serving, Store, TOP_NUMBER, inode_number, path_number};
use crate::sys::users::{self, PATIENCE};

/// Inode numbers of everything in the mounts of a store but the files of templates that do not open.
#[derive(Debug)]
pub struct Explained(HashSet<u64>);

impl Explained {
    /// What the store has now. A removal that has begun hides tags: the numbers are taken before.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn by(store: &Store) -> Result<Explained> {
        let secret = store.secret();
        let mut numbers = HashSet::from([TOP_NUMBER]);
        let mut paths = vec!["by-id".to_owned(), "templates".to_owned()];
        for tag in store.tags()? {
            paths.push(format!("templates/{}", tag.name));
            paths.push(format!("templates/{}/{}", tag.name, tag.tag));
        }
        for digest in store.digests()? {
            paths.push(format!("by-id/{digest}"));
            numbers.insert(inode_number(&secret, &digest, MANIFEST, Serving::Decode));
            let Ok(template) = store.template(&digest) else { continue };
            for file in template.files() {
                numbers.extend(Serving::ALL.map(|how| inode_number(&secret, &digest, &file.name, how)));
            }
        }
        numbers.extend(paths.iter().map(|path| path_number(&secret, path)));
        Ok(Explained(numbers))
    }

    /// Processes that map (`map`) or have open (`open`) anything else in one of these mounts of `store`.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) where a process was not seen, or when the store cannot be read.
    pub fn users_of_others(&self, store: &Store, mounts: &[Mount]) -> Result<BTreeMap<u32, &'static str>> {
        // What was imported since.
        let now = Explained::by(store)?;
        let is_other = |ino: &u64| !self.0.contains(ino) && !now.0.contains(ino);
        let mut using = BTreeMap::new();
        for mount in mounts {
            let users = users::users_of(mount.device, PATIENCE)?;
            Search { clones: Vec::new(), unseen: users.unseen }.complete()?;
            for user in users.found {
                if user.mapped.iter().any(is_other) {
                    using.insert(user.pid, "map");
                } else if user.open.iter().any(is_other) {
                    using.entry(user.pid).or_insert("open");
                }
            }
        }
        Ok(using)
    }
}
