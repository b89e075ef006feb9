//! Answers READs, in the thread that took the request or in the thread that waits for the store.

use std::sync::Arc;

use stencilfs::control::Phase;
use stencilfs::store::Digest;

use crate::server::decode::Decoder;
use crate::server::in_flight::Flight;
use crate::server::node::Node;
use crate::server::refusal::Refusal;
use crate::server::tree::Tree;
use stencilfs::units::to_usize;

/// Answers READs of the files in a tree.
#[derive(Debug)]
pub struct Reader {
    tree: Arc<Tree>,
    decoder: Decoder,
}

impl Reader {
    /// Creates a reader.
    pub fn new(tree: Arc<Tree>, decoder: Decoder) -> Reader {
        Reader { tree, decoder }
    }

    /// Produces the bytes that a READ requests and passes them to `send`, at most once.
    ///
    /// # Errors
    /// Returns the refusal if nothing was sent; [`Refusal::Away`] if the same READ may succeed later.
    pub fn read(&self, flight: &Flight, send: impl FnOnce(&[u8])) -> Result<(), Refusal> {
        let mut send = Some(send);
        let mut send = |bytes: &[u8]| {
            if let Some(send) = send.take() {
                flight.replying();
                send(bytes);
            }
        };
        let request = flight.request();
        match self.tree.node(request.ino)? {
            Node::File(digest, file, _) => {
                flight.stamp(Phase::Decoding);
                self.file(&digest, file, request.offset, request.size, &mut send)
            }
            Node::Manifest(digest) => {
                let text = self.tree.template(&digest)?.manifest_json();
                let start = to_usize(request.offset).min(text.len());
                let end = start.saturating_add(request.size as usize).min(text.len());
                send(&text.as_bytes()[start..end]);
                Ok(())
            }
            _ => Err(Refusal::IsDirectory),
        }
    }

    fn file(
        &self,
        digest: &Digest,
        file: usize,
        offset: u64,
        size: u32,
        send: &mut impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let template = self.tree.template_in_use(digest)?;
        match self.decoder.read(&template, file, offset, size as usize, &mut *send) {
            Err(Refusal::Away) => Err(Refusal::Away),
            Err(refusal) if !self.tree.removed(digest)? => {
                // A collection may have moved blocks since the template was opened: reopen it and retry once.
                let template = match self.tree.reopen(digest) {
                    Err(Refusal::Away) => return Err(Refusal::Away),
                    other => other.map_err(|_| refusal)?,
                };
                self.decoder.read(&template, file, offset, size as usize, send)
            }
            done => done,
        }
    }
}
