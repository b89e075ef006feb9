//! Answers READs, in the thread that read the request, in the thread that waits for the store, or in the thread
//! that waits for the supervisor.
//!
//! A READ that fails is repeated in two cases. [`Template`] repeats the READ if the tables in the store differ from
//! those that it has open: a collection has moved blocks, or an import has repaired them. [`outage`] repeats the READ
//! while the store is away.

pub mod damage;
pub mod decode;
pub mod outage;
pub mod reply_buffers;

use std::sync::Arc;

use stencilfs::control::{FileKey, Phase};
use stencilfs::store::{BLOCK_SIZE, Template};
use stencilfs::units::to_usize;

use crate::protocol::stats::Stats;
use crate::server::in_flight::Flight;
use crate::server::read::damage::DamagedReads;
use crate::server::read::decode::Decoder;
use crate::server::refusal::Refusal;
use crate::server::tree::Tree;
use crate::server::tree::node::Node;

/// Answers READs of the files in a tree.
#[derive(Debug)]
pub struct Reader {
    tree: Arc<Tree>,
    decoder: Decoder,
    /// `None` if READs of damaged blocks only fail.
    damaged: Option<DamagedReads>,
    stats: Stats,
}

impl Reader {
    /// Creates a reader.
    pub fn new(tree: Arc<Tree>, decoder: Decoder, damaged: Option<DamagedReads>, stats: Stats) -> Reader {
        Reader { tree, decoder, damaged, stats }
    }

    /// Sends the reply to a READ. If the process is to be stopped first, another thread sends the reply later. Returns
    /// the READ without a reply if the store is away.
    pub fn answer<R>(&self, flight: Flight, reply: R) -> Option<(Flight, R)>
    where
        R: FnOnce(Result<&[u8], Refusal>) + Send + 'static,
    {
        let mut unsent = Some(reply);
        let done = self.read(&flight, |bytes| {
            flight.replying();
            if let Some(reply) = unsent.take() {
                reply(Ok(bytes));
            }
        });
        let (Err(refusal), Some(reply)) = (done, unsent) else { return None };
        if refusal == Refusal::Away {
            return Some((flight, reply));
        }
        refusal.counter().into_iter().for_each(|counter| self.stats.count(counter));
        // `Failed` is any other failure, for example of the disk. The process would get the same EIO.
        if matches!(refusal, Refusal::Damaged | Refusal::Failed)
            && let Some(damaged) = self.damaged.as_ref().filter(|_| DamagedReads::includes(flight.request()))
            && let Some(key) = self.key(flight.request().ino)
        {
            damaged.refuse(flight, key, refusal, Box::new(reply));
            return None;
        }
        flight.replying();
        reply(Err(refusal));
        None
    }

    /// Returns the file of an inode number. If the template is so damaged that it cannot be opened, the name is `#` and
    /// the index of the file.
    fn key(&self, ino: u64) -> Option<FileKey> {
        let Node::File(digest, file, _) = self.tree.node(ino).ok()? else { return None };
        let template = self.tree.template_in_use(&digest).ok();
        let name = template.and_then(|template| Some(template.files().get(file)?.name.clone()));
        Some(FileKey { digest, file: name.unwrap_or_else(|| format!("#{file}")) })
    }

    /// Passes the requested bytes to `send`, or returns the refusal.
    fn read(&self, flight: &Flight, send: impl FnOnce(&[u8])) -> Result<(), Refusal> {
        let request = flight.request();
        match self.tree.node(request.ino)? {
            Node::File(digest, file, _) => {
                flight.stamp(Phase::Decoding);
                let template = self.tree.template_in_use(&digest)?;
                self.decoder.read(&template, file, request.offset, to_usize(request.size.into()), send)
            }
            Node::Manifest(digest) => {
                let text = self.tree.template_in_use(&digest)?.manifest_json();
                let start = to_usize(request.offset).min(text.len());
                let end = start.saturating_add(to_usize(request.size.into())).min(text.len());
                send(&text.as_bytes()[start..end]);
                Ok(())
            }
            _ => Err(Refusal::IsDirectory),
        }
    }
}

/// Implements `SEEK_DATA` and `SEEK_HOLE`, with the granularity of blocks.
///
/// # Errors
/// Returns [`Refusal::NoPosition`] (ENXIO) beyond the end of the file, and for `SEEK_DATA` beyond the last data;
/// [`Refusal::Invalid`] for other values of `whence`.
pub fn seek(template: &Template, file: usize, offset: i64, whence: i32) -> Result<i64, Refusal> {
    let length = template.files().get(file).ok_or(Refusal::Stale)?.size.get();
    let from = u64::try_from(offset).map_err(|_| Refusal::NoPosition)?;
    let want_data = match whence {
        libc::SEEK_DATA => true,
        libc::SEEK_HOLE => false,
        _ => return Err(Refusal::Invalid),
    };
    if from >= length {
        return Err(Refusal::NoPosition);
    }
    for block in from / BLOCK_SIZE..template.block_count(file) {
        let is_data = template.block_id(file, block).map_err(|e| Refusal::from(&e))?.is_some();
        if is_data == want_data {
            return Ok((block * BLOCK_SIZE).max(from).cast_signed());
        }
    }
    if want_data { Err(Refusal::NoPosition) } else { Ok(length.cast_signed()) }
}
