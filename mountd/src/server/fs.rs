//! The file system of a mount: answers every request of the kernel. Independent of FUSE.
//!
//! Each method enters the request into the in-flight table, and passes its result to `reply`, during the call or later.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use stencilfs::control::{Op, RequestInfo};
use stencilfs::store::Serving;
use stencilfs::units::Bytes;

use crate::protocol::stats::{Counter, Stats};
use crate::server::backings::Backings;
use crate::server::in_flight::{Flight, Flights};
use crate::server::pending::{OpenReply, Opened, PendingOpen};
use crate::server::read::outage::StoreOutage;
use crate::server::read::{Reader, seek};
use crate::server::refusal::Refusal;
use crate::server::tree::Tree;
use crate::server::tree::condemned::Condemned;
use crate::server::tree::node::{Attributes, DirectoryEntry, NameLifetime, Node};

/// Validity of entries whose content never changes. Limits how long the kernel keeps the entries of a removed template.
const ENTRY_TTL: Duration = Duration::from_secs(3600);

/// Validity of attributes: the policy in the store may change mode and owner.
pub const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);

/// A name that was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundEntry {
    /// Attributes of the node.
    pub attributes: Attributes,
    /// How long the kernel may cache the name.
    pub ttl: Duration,
}

/// The file system of one mount.
#[derive(Debug)]
pub struct FileSystem {
    /// Names, attributes and inode numbers.
    pub tree: Arc<Tree>,
    /// Answers READs.
    pub reader: Arc<Reader>,
    /// READs that wait for the store.
    pub outage: Arc<StoreOutage>,
    /// Backings, and opens that wait for them.
    pub backings: Arc<Backings>,
    /// Condemned templates.
    pub condemned: Arc<Condemned>,
    /// Counters.
    pub stats: Stats,
    /// The in-flight table.
    pub flights: &'static Flights,
}

impl FileSystem {
    /// Looks up a name in the directory of the request.
    pub fn lookup(
        &self,
        request: RequestInfo,
        name: &OsStr,
        reply: impl FnOnce(Result<FoundEntry, Refusal>),
    ) {
        let flight = self.flights.enter(request);
        self.stats.count(Counter::Lookups);
        let _guard = self.condemned.guard();
        let found = self.tree.lookup(request.ino, name, &*self.backings).map(|(attributes, lifetime)| {
            let ttl = match lifetime {
                NameLifetime::Zero => Duration::ZERO,
                NameLifetime::Long => ENTRY_TTL,
            };
            FoundEntry { attributes, ttl }
        });
        self.finish(&flight, found, reply);
    }

    /// Returns the attributes of a node.
    pub fn attributes(&self, request: RequestInfo, reply: impl FnOnce(Result<Attributes, Refusal>)) {
        let flight = self.flights.enter(request);
        self.finish(&flight, self.tree.attributes(request.ino), reply);
    }

    /// Returns the target of a symbolic link.
    pub fn read_link(&self, request: RequestInfo, reply: impl FnOnce(Result<String, Refusal>)) {
        let flight = self.flights.enter(request);
        self.finish(&flight, self.tree.read_link(request.ino), reply);
    }

    /// Opens a file for reading. The reply comes later if a backing has to be made first.
    pub fn open(&self, request: RequestInfo, flags: OFlags, reply: OpenReply) {
        let flight = self.flights.enter(request);
        if !(flags & OFlags::RWMODE).is_empty() || flags.contains(OFlags::TRUNC) {
            self.stats.count(Counter::OpensRefused);
            flight.replying();
            return reply(Err(Refusal::Writes));
        }
        let _guard = self.condemned.guard();
        let openable = self.openable(request.ino);
        if let Ok(Node::File(digest, ..)) = &openable {
            self.condemned.opened(digest);
        }
        let opened = openable.and_then(|node| match node {
            // The kernel fails such an open with EIO, which programs take for a defect.
            Node::File(_, _, Serving::Passthrough)
                if flags.contains(OFlags::DIRECT) && !self.backings.allow_direct_reads() =>
            {
                Err(Refusal::Invalid)
            }
            Node::File(digest, file, Serving::Passthrough) => Ok(Some((self.tree.template(&digest)?, file))),
            Node::File(..) => {
                self.stats.count(Counter::OpensDecode);
                Ok(None)
            }
            _ => Ok(None),
        });
        match opened {
            Ok(Some((template, file))) => {
                self.backings.open(&template, file, PendingOpen::new(reply, flight));
            }
            Ok(None) => self.finish(&flight, Ok(Opened::Decode), reply),
            Err(refusal) => self.finish(&flight, Err(refusal), reply),
        }
    }

    /// Returns the node of a file that may be opened.
    fn openable(&self, ino: u64) -> Result<Node, Refusal> {
        let node = self.tree.node(ino)?;
        match node {
            Node::File(digest, ..) | Node::Manifest(digest) if self.tree.gone(&digest)? => {
                Err(Refusal::Stale)
            }
            Node::File(..) | Node::Manifest(_) => Ok(node),
            Node::Tag(_) => Err(Refusal::Invalid),
            _ => Err(Refusal::IsDirectory),
        }
    }

    /// Reads the range of the request. The reply comes later if the store is away.
    pub fn read(&self, request: RequestInfo, reply: impl FnOnce(Result<&[u8], Refusal>) + Send + 'static) {
        let flight = self.flights.enter(request);
        if let Some((flight, reply)) = self.reader.answer(flight, reply) {
            self.outage.wait(flight, Box::new(reply));
        }
    }

    /// Returns the position of the next data or hole (`SEEK_DATA`, `SEEK_HOLE`).
    pub fn seek(
        &self,
        request: RequestInfo,
        (offset, whence): (i64, i32),
        reply: impl FnOnce(Result<i64, Refusal>),
    ) {
        let flight = self.flights.enter(request);
        let found = self.tree.node(request.ino).and_then(|node| match node {
            Node::File(digest, file, _) => seek(&*self.tree.template(&digest)?, file, offset, whence),
            _ => Err(Refusal::Unsupported),
        });
        self.finish(&flight, found, reply);
    }

    /// Lists the directory of the request, from the entry after the cookie `after`.
    pub fn list(
        &self,
        request: RequestInfo,
        after: u64,
        reply: impl FnOnce(Result<Vec<DirectoryEntry>, Refusal>),
    ) {
        let flight = self.flights.enter(request);
        self.finish(&flight, self.tree.list(request.ino, after, &*self.backings), reply);
    }

    /// Returns the number of templates, and the bytes of data in them.
    pub fn totals(&self, request: RequestInfo, reply: impl FnOnce(Result<(u64, Bytes), Refusal>)) {
        let flight = self.flights.enter(request);
        self.finish(&flight, self.tree.totals(), reply);
    }

    /// Refuses a request to change attributes; `resizes` if the length is one of them.
    pub fn set_attributes(&self, request: RequestInfo, resizes: bool, reply: impl FnOnce(Refusal)) {
        self.refuse_with(request, if resizes { Refusal::Writes } else { Refusal::Policy }, reply);
    }

    /// Refuses a request that this file system does not support.
    pub fn refuse(&self, request: RequestInfo, reply: impl FnOnce(Refusal)) {
        let refusal = match request.op {
            // Nothing to flush, no extended attributes and no ioctls. After ENOSYS the kernel sends no more requests of
            // most of these kinds, and itself returns success, EOPNOTSUPP or ENOTTY.
            Op::Flush
            | Op::FSync
            | Op::FSyncDir
            | Op::SetXAttr
            | Op::GetXAttr
            | Op::ListXAttr
            | Op::RemoveXAttr
            | Op::IoCtl
            | Op::CopyFileRange => Refusal::Unsupported,
            _ => Refusal::Writes,
        };
        self.refuse_with(request, refusal, reply);
    }

    fn refuse_with(&self, request: RequestInfo, refusal: Refusal, reply: impl FnOnce(Refusal)) {
        let flight = self.flights.enter(request);
        self.finish(&flight, Err::<(), _>(refusal), |_| reply(refusal));
    }

    /// Counts a refusal, and sends the reply.
    fn finish<T>(&self, flight: &Flight, result: Result<T, Refusal>, reply: impl FnOnce(Result<T, Refusal>)) {
        if let Err(refusal) = &result {
            refusal.counter().into_iter().for_each(|counter| self.stats.count(counter));
            if *refusal == Refusal::Away {
                self.outage.note();
            }
        }
        flight.replying();
        reply(result);
    }
}

#[cfg(test)]
mod tests;
