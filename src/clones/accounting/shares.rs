//! Splits the memory of the host between clones, so that the subtotals of any groups of clones add up to the whole.
//!
//! Memory that several clones share is split between them in equal parts. What no clone uses stays apart.

use std::ops::AddAssign;

use serde::Serialize;

use crate::units::Bytes;

/// The parts of which `host_bytes` is the sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Template pages in RAM.
    pub template_bytes: Bytes,
    /// Page cache of the store's files, and memory of the supervisors and servers.
    pub store_cache_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in RAM.
    pub private_bytes: Bytes,
    /// Page tables, including those of KVM.
    pub page_table_bytes: Bytes,
    /// Memory outside template mappings.
    pub overhead_bytes: Bytes,
    /// Disks and jails in a file system without other storage.
    pub disk_bytes: Bytes,
}

impl Parts {
    /// Returns the memory that exists for the clones alone.
    pub fn of_the_clones(&self) -> Bytes {
        self.private_bytes + self.page_table_bytes + self.overhead_bytes + self.disk_bytes
    }

    /// Returns the sum of all parts.
    pub fn host_bytes(&self) -> Bytes {
        self.template_bytes + self.store_cache_bytes + self.of_the_clones()
    }
}

impl AddAssign for Parts {
    fn add_assign(&mut self, other: Parts) {
        self.template_bytes += other.template_bytes;
        self.store_cache_bytes += other.store_cache_bytes;
        self.private_bytes += other.private_bytes;
        self.page_table_bytes += other.page_table_bytes;
        self.overhead_bytes += other.overhead_bytes;
        self.disk_bytes += other.disk_bytes;
    }
}

/// The memory of the host, split between the clones.
#[derive(Debug, Clone, Default)]
pub struct Shares {
    /// The share of each clone, in the order of the survey.
    pub clones: Vec<Parts>,
    /// What no clone uses.
    pub unused: Parts,
}

/// The pages of one template.
#[derive(Debug, Clone)]
pub(super) struct TemplatePages {
    /// Size of the pages in RAM.
    pub resident: Bytes,
    /// Indexes of the clones that map the template.
    pub users: Vec<usize>,
}

impl Shares {
    /// Adds to what each clone has alone, `own`, its share of the templates' pages, and of the RAM of the stores.
    pub(super) fn new(own: Vec<Parts>, templates: &[TemplatePages], store_cache: Bytes) -> Shares {
        let mut shares = Shares { clones: own, unused: Parts::default() };
        for TemplatePages { resident, users } in templates {
            shares.split(*resident, users, |parts| &mut parts.template_bytes);
        }
        let all: Vec<usize> = (0..shares.clones.len()).collect();
        shares.split(store_cache, &all, |parts| &mut parts.store_cache_bytes);
        shares
    }

    fn split(&mut self, bytes: Bytes, users: &[usize], part: fn(&mut Parts) -> &mut Bytes) {
        if users.is_empty() {
            *part(&mut self.unused) += bytes;
        }
        for (user, share) in users.iter().zip(bytes.split(users.len())) {
            *part(&mut self.clones[*user]) += share;
        }
    }

    /// Returns the sum of all shares.
    pub fn total(&self) -> Parts {
        let mut total = self.unused;
        self.clones.iter().for_each(|share| total += *share);
        total
    }
}
