//! How many more clones fit into the memory of the host.

use serde::Serialize;

use crate::clones::accounting::Totals;
use crate::error::{Error, Result};
use crate::sys::probe;
use crate::sys::process::procfs;
use crate::units::Bytes;

/// Value of `vm.overcommit_memory` with which the kernel enforces the commit limit.
const NEVER_OVERCOMMIT: u64 = 2;

/// Memory that further clones can take, and an estimate of their number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Headroom {
    /// `MemAvailable` without the pages of the templates of all mounts. The kernel counts these pages as available, but clones need them.
    pub available_bytes: Bytes,
    /// Rest of the commit limit; null if the kernel does not enforce the limit.
    pub commit_left_bytes: Option<Bytes>,
    /// What one clone takes of the commit limit, at least: its template mappings. The mean of the present clones, null
    /// without clones.
    pub commit_bytes_per_clone: Option<Bytes>,
    /// Number of further clones like the present ones, as an estimate; null without clones.
    pub further_clones: Option<u64>,
}

impl Headroom {
    /// Reads the present figures of the host. `templates` is the size of the template pages of all mounts.
    ///
    /// # Errors
    /// Returns an error if these figures cannot be read.
    pub fn now(totals: &Totals, templates: Bytes) -> Result<Headroom> {
        let read = |key: &str| {
            procfs::meminfo(key)?.ok_or_else(|| Error::failed(format!("missing {key} in /proc/meminfo")))
        };
        let is_limited = probe::number("/proc/sys/vm/overcommit_memory") == Some(NEVER_OVERCOMMIT);
        let left = || Ok::<_, Error>(read("CommitLimit")?.saturating_sub(read("Committed_AS")?));
        let commit_left = is_limited.then(left).transpose()?;
        Ok(Headroom::of(totals, templates, read("MemAvailable")?, commit_left))
    }

    fn of(totals: &Totals, templates: Bytes, available: Bytes, commit_left: Option<Bytes>) -> Headroom {
        let mut headroom = Headroom {
            available_bytes: available.saturating_sub(templates),
            commit_left_bytes: commit_left,
            commit_bytes_per_clone: totals.mapped_bytes.get().checked_div(totals.clones).map(Bytes::new),
            further_clones: None,
        };
        headroom.further_clones = totals.bytes_per_further_clone.and_then(|each| headroom.fit(each));
        headroom
    }

    /// Returns how many clones fit that take this much memory each, within both limits.
    pub fn fit(&self, each: Bytes) -> Option<u64> {
        let memory = self.available_bytes.get().checked_div(each.get());
        memory.into_iter().chain(self.fit_commit()).min()
    }

    /// Returns how many clones the commit limit allows.
    fn fit_commit(&self) -> Option<u64> {
        self.commit_left_bytes?.get().checked_div(self.commit_bytes_per_clone?.get())
    }

    /// Returns true if the commit limit allows fewer clones than the memory.
    pub fn is_limited_by_commit(&self) -> bool {
        self.fit_commit().is_some() && self.fit_commit() == self.further_clones
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_limit_counts_and_template_pages_are_not_available() {
        let totals = Totals {
            clones: 4,
            mapped_bytes: Bytes::new(400),
            // Of one template. All templates have 100 bytes.
            template_bytes: Bytes::new(40),
            bytes_per_further_clone: Some(Bytes::new(30)),
            ..Totals::default()
        };
        let headroom =
            |available, commit| Headroom::of(&totals, Bytes::new(100), Bytes::new(available), commit);
        assert_eq!(headroom(1000, None).further_clones, Some(30));
        assert_eq!(headroom(1000, Some(Bytes::new(699))).further_clones, Some(6));
        assert!(headroom(1000, Some(Bytes::new(699))).is_limited_by_commit());
        assert_eq!(headroom(200, Some(Bytes::new(9999))).further_clones, Some(3));
        assert!(!headroom(200, Some(Bytes::new(9999))).is_limited_by_commit());
        assert_eq!(headroom(50, None).further_clones, Some(0));
        assert_eq!(
            Headroom::of(&Totals::default(), Bytes::ZERO, Bytes::new(9), Some(Bytes::new(9))).further_clones,
            None
        );
    }
}
