//! A template as its clones will see it: a folder below a mount, resolved once.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::clones::recipe::{Recipe, Values};
use crate::clones::registry::StoreOfClone;
use crate::control::{self, Lease};
use crate::error::{Error, Result};
use crate::store::{Digest, Serving, Store, TemplateFile, TemplateRef, inode_number};

/// The template of a launch.
#[derive(Debug, Clone)]
pub struct Target {
    /// As it was asked for.
    pub name: String,
    /// What that is.
    pub digest: Digest,
    /// Its store.
    pub store: StoreOfClone,
    /// Its folder, `MNT/by-id/<digest>`.
    pub dir: PathBuf,
    /// Its files.
    pub files: Vec<TemplateFile>,
    /// Device of the mount, and the inodes of memory files for each way of serving.
    pub inodes: (u64, Vec<u64>),
    /// When it was made.
    pub created: SystemTime,
    recipe: Option<serde_json::Value>,
}

impl Target {
    /// Finds the template and a mount that serves its store, for this command. The lease is to be held until its clones
    /// map it.
    ///
    /// # Errors
    /// When there is no such template, or no mount of that store.
    pub fn find(store: &Store, reference: &TemplateRef, command: &str) -> Result<(Target, Lease)> {
        let (digest, lease) = Lease::of(store, reference, command)?;
        let template = store.template(&digest)?;
        let mount = control::mounts_of(store)?.into_iter().find(|m| !m.detached).ok_or_else(|| {
            Error::failed("no mount serves this store, so clones cannot map its templates")
                .at(store.dir())
                .remedy(format!("mount it first: stencil --store {} mount MNT", store.dir().display()))
        })?;
        let secret = store.secret();
        let inodes = template
            .files()
            .iter()
            .filter(|f| f.kind.is_memory())
            .flat_map(|f| Serving::ALL.map(|serving| inode_number(&secret, &digest, &f.name, serving)))
            .collect();
        let dir = mount.mountpoint.join("by-id").join(digest.to_string());
        // A mount that does not answer is found here, not in a hundred clones.
        std::fs::metadata(&dir).map_err(|e| {
            Error::io("the mount does not show this template", &dir, e).remedy("see `stencil status`")
        })?;
        let target = Target {
            name: reference.to_string(),
            digest,
            store: StoreOfClone { path: store.dir().to_owned(), id: store.id() },
            dir,
            files: template.files().to_vec(),
            inodes: (mount.device, inodes),
            created: UNIX_EPOCH + Duration::from_secs(template.policy().created),
            recipe: template.policy().recipe.clone(),
        };
        Ok((target, lease))
    }

    /// The template's own recipe.
    ///
    /// # Errors
    /// When it has none, or one that this build does not know.
    pub fn recipe(&self) -> Result<Recipe> {
        self.recipe_if_any()?.ok_or_else(|| {
            Error::usage(format!(
                "template {} has no launch recipe: it was not captured from a VM",
                self.name
            ))
            .remedy("say what a clone is: --simulate read=P%,write=P%, or -- CMD with {memory} and {state}")
        })
    }

    /// The template's own recipe, if it has one.
    ///
    /// # Errors
    /// When this build does not know it.
    pub fn recipe_if_any(&self) -> Result<Option<Recipe>> {
        self.recipe.as_ref().map(Recipe::from_value).transpose()
    }

    /// Its files' paths as values of placeholders.
    pub fn values(&self) -> Values {
        let path = |f: &TemplateFile| (f.name.clone(), self.dir.join(&f.name).display().to_string());
        Values::new(&self.name, &self.files.iter().map(path).collect::<Vec<_>>())
    }

    /// True for a mapping of the template's memory.
    pub fn is_mapped_by(&self, dev: u64, ino: u64) -> bool {
        dev == self.inodes.0 && self.inodes.1.contains(&ino)
    }
}
