//! Mounts whose processes are dead, and the clones that still map their templates.

use std::path::PathBuf;

use serde::Serialize;

use super::CloneProcess;
use crate::clones::counted;
use crate::control::Mount;

/// A mount whose supervisor and server are dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadMount {
    /// Mountpoint.
    #[serde(serialize_with = "crate::sanitize::path")]
    pub mountpoint: PathBuf,
    /// Number of clones that map a template through the mount.
    pub clones: u64,
    /// What to do next.
    pub remedy: String,
    /// What has happened.
    #[serde(skip)]
    message: String,
    /// Device number of the mount.
    #[serde(skip)]
    pub device: u64,
}

impl DeadMount {
    /// Returns the dead ones of the mounts that the clones were found in.
    pub fn of<'a>(
        mounts: &[Mount],
        clones: impl Iterator<Item = &'a CloneProcess> + Clone,
    ) -> Vec<DeadMount> {
        let dead = mounts.iter().enumerate().filter(|(_, mount)| mount.is_dead());
        let with_error = dead.map(|(index, mount)| (index, mount, mount.lost_both()));
        with_error
            .map(|(index, mount, error)| DeadMount {
                mountpoint: mount.mountpoint.clone(),
                clones: clones.clone().filter(|clone| clone.maps.iter().any(|map| map.mount == index)).count()
                    as u64,
                remedy: error.hint_text().unwrap_or_default().to_owned(),
                message: error.message().to_owned(),
                device: mount.device,
            })
            .collect()
    }

    /// Describes the dead mount and its clones.
    pub fn describe(&self) -> String {
        let map = if self.clones == 1 { "maps" } else { "map" };
        format!(
            "{}: {}; {} still {map} its templates",
            self.mountpoint.display(),
            self.message,
            counted(self.clones, "clone", "clones"),
        )
    }
}
