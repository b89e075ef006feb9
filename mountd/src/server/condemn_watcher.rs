//! Applies changes of the list of condemned templates to all parts of the server.
//!
//! ```text
//!   supervisor writes ledger, increments ring ─▶ watcher publishes the new list ─▶ replies based on the old list are sent
//!   ─▶ waiting opens are refused, backings in progress are abandoned ─▶ watcher reports to the supervisor
//! ```
//! The supervisor relies on the new list only after the report: if a server dies before the report, the removal only
//! takes longer.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use stencilfs::store::{Digest, Store};
use stencilfs::sys::fuse::device;

use crate::protocol::ServerRequest;
use crate::protocol::ledger;
use crate::protocol::link::Link;
use crate::protocol::stats::Stats;
use crate::server::backings::Backings;
use crate::server::tree::Tree;
use crate::server::tree::condemned::Condemned;
use crate::server::tree::node::Node;

/// The thread that watches the list, before its start.
#[derive(Debug)]
pub struct Watcher {
    /// The list.
    pub condemned: Arc<Condemned>,
    /// Names and attributes.
    pub tree: Arc<Tree>,
    /// Backings, and opens that wait for them.
    pub backings: Arc<Backings>,
    /// The store.
    pub store: Store,
    /// The FUSE connection.
    pub fuse: OwnedFd,
    /// The ledger, which holds the list.
    pub ledger: OwnedFd,
    /// The counters page, which holds the ring.
    pub stats: Stats,
    /// The link to the supervisor.
    pub link: Arc<Link>,
}

impl Watcher {
    /// Starts a thread that applies the list after each increment of the ring. `rings` is the ring before this server
    /// read its first list.
    pub fn start(self, rings: u32) {
        // A supervisor whose ring is 0 may be of a version that cannot parse the report.
        let first = (rings != 0).then_some(rings);
        thread::spawn(move || {
            let mut applied = rings;
            if let Some(first) = first {
                self.apply(first);
            }
            loop {
                self.stats.page().wait_for_ring(applied);
                let now = self.stats.page().rings();
                if now != applied {
                    applied = now;
                    self.apply(applied);
                }
            }
        });
    }

    fn apply(&self, ring: u32) {
        let rows = match ledger::read_snapshot(&self.ledger) {
            Ok(snapshot) => snapshot.condemned,
            // The supervisor keeps waiting, and the removal times out.
            Err(error) => return log::error!("cannot read the list of condemned templates: {error}"),
        };
        self.condemned.change(&rows);
        while !self.condemned.is_settled() {
            // A newer list must be published even while a reader hangs, as the list may release templates.
            if self.stats.page().rings() != ring {
                return;
            }
        }
        rows.iter().filter(|row| !row.removed).for_each(|row| self.invalidate_names(&row.digest));
        let grace = self.condemned.grace();
        self.backings.stop_condemned();
        // The disk space of deleted files is freed only when the server closes them.
        self.tree.close_templates();
        self.store.close_vanished();
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        if let Err(error) = self.link.request_done(&ServerRequest::Condemned { ring, grace_ms }) {
            log::error!("cannot report the list of condemned templates as applied: {error}");
        }
        // The backings are evicted after the report, because the caller of a removal waits for the report.
        self.backings.evict_vanished(&self.store);
        self.backings.renew(&self.tree, &self.store);
    }

    /// Makes the kernel drop the unused inodes of a template's files, which would otherwise count as in use. Cannot
    /// deadlock: other threads answer lookups, and a file with a pending READ is in use, so the kernel does not wait
    /// for its pages here.
    fn invalidate_names(&self, digest: &Digest) {
        let Ok(template) = self.tree.template_in_use(digest) else { return };
        let directory = self.tree.ino(&Node::Template(*digest));
        for file in template.files() {
            device::invalidate_name(&self.fuse, directory, &file.name).unwrap_or_else(|e| {
                log::warn!(template:% = digest, file = file.name; "cannot invalidate {digest}/{} in the kernel: {e}", file.name)
            });
        }
    }
}

#[cfg(test)]
mod tests;
