//! The template of a launch as its clones see it: a directory below a mount, resolved once.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::clones::recipe::{Recipe, Values};
use crate::clones::registry::CloneStore;
use crate::clones::vmm::Served;
use crate::control::{self, Lease};
use crate::error::{Error, Result};
use crate::store::{Digest, Roles, Serving, Store, TemplateFile, TemplateRef, inode_number};
use crate::sys::probe;

/// The template of a launch.
#[derive(Debug, Clone)]
pub struct Target {
    /// The tag or digest that the user gave.
    pub name: String,
    /// Digest of the template.
    pub digest: Digest,
    /// The store of the template.
    pub store: CloneStore,
    /// Directory of the template, `MNT/by-id/<digest>`.
    pub dir: PathBuf,
    /// Files of the template.
    pub files: Vec<TemplateFile>,
    /// Which files are memory and state.
    pub roles: Roles,
    /// Device number of the mount, and the inode numbers of the memory files for each way of serving.
    pub inodes: (u64, Vec<u64>),
    /// Creation time of the template.
    pub created: SystemTime,
    recipe: Option<serde_json::Value>,
}

impl Target {
    /// Finds a template and a mount that serves its store. `command` is the name of the command in the lease, which the
    /// caller must hold until the clones map the template.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the template does not exist or its store is not
    /// mounted, and an error if the mount does not show the template.
    pub fn find(store: &Store, reference: &TemplateRef, command: &str) -> Result<(Target, Lease)> {
        let (digest, lease) = Lease::of(store, reference, command)?;
        let template = store.template(&digest)?;
        let mount = control::mount_of(store)?;
        let secret = store.secret();
        let inodes = template
            .files()
            .iter()
            .filter(|f| f.kind.is_memory())
            .flat_map(|f| Serving::ALL.map(|serving| inode_number(&secret, &digest, &f.name, serving)))
            .collect();
        let dir = mount.mountpoint.join("by-id").join(digest.to_string());
        // Detects a mount that does not reply before any clone is started.
        std::fs::metadata(&dir).map_err(|e| {
            Error::io("cannot access the template in the mount", &dir, e)
                .hint("check the mount with `stencil status`")
        })?;
        let target = Target {
            name: reference.to_string(),
            digest,
            store: CloneStore { path: store.dir().to_owned(), id: store.id() },
            dir,
            files: template.files().to_vec(),
            roles: template.roles()?,
            inodes: (mount.device, inodes),
            created: UNIX_EPOCH + Duration::from_secs(template.policy().created),
            recipe: template.policy().recipe.clone(),
        };
        Ok((target, lease))
    }

    /// Returns the template's recipe.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the template has no recipe, and another error if this
    /// build does not support the recipe.
    pub fn recipe(&self) -> Result<Recipe> {
        self.recipe_if_any()?.ok_or_else(|| {
            Error::usage(Recipe::missing(&self.name))
                .hint("pass --simulate read=P%,write=P%, or a command: -- CMD with {memory} and {state}")
        })
    }

    /// Returns the template's recipe; `None` if the template has no recipe.
    ///
    /// # Errors
    /// Returns an error if this build does not support the recipe.
    pub fn recipe_if_any(&self) -> Result<Option<Recipe>> {
        let parse =
            |value| Recipe::from_value(value).map_err(|e| e.context(format!("template {}", self.name)));
        self.recipe.as_ref().map(parse).transpose()
    }

    /// Returns the paths of the files as placeholder values.
    pub fn values(&self) -> Values {
        let path = |f: &TemplateFile| (f.name.clone(), self.dir.join(&f.name).display().to_string());
        Values::new(&self.name, &self.files.iter().map(path).collect::<Vec<_>>(), &self.roles)
    }

    /// Returns the template as a VMM sees it in the mount.
    ///
    /// # Errors
    /// Returns an error if the template cannot be read, or if this build does not support its recipe.
    pub fn served(&self, store: &Store) -> Result<Served> {
        let template = store.template(&self.digest)?;
        let state = self.roles.state.as_deref().and_then(|name| template.file(name));
        Ok(Served {
            name: self.name.clone(),
            files: self.files.clone(),
            roles: self.roles.clone(),
            values: self.values(),
            recipe: self.recipe_if_any()?,
            state_head: state.map(|file| template.head(file)).transpose()?,
            commits_strictly: probe::commits_strictly(),
            documents: BTreeMap::new(),
            clone_dir: None,
        })
    }

    /// Returns true if a mapping of this device and inode number is of the template's memory.
    pub fn is_mapped_by(&self, dev: u64, ino: u64) -> bool {
        dev == self.inodes.0 && self.inodes.1.contains(&ino)
    }
}
