//! Answers READs, whoever gives the answer: the thread that took one, or the one that waits for the store.

use std::sync::Arc;

use stencilfs::control::Phase;
use stencilfs::store::Digest;

use crate::server::decode::Decoder;
use crate::server::in_flight::Flight;
use crate::server::node::Node;
use crate::server::refusal::Refusal;
use crate::server::tree::Tree;

/// Reads files of a tree.
#[derive(Debug)]
pub struct Reader {
    tree: Arc<Tree>,
    decoder: Decoder,
}

impl Reader {
    /// Reads so.
    pub fn new(tree: Arc<Tree>, decoder: Decoder) -> Reader {
        Reader { tree, decoder }
    }

    /// Makes the bytes that a READ asks for and passes them to `send`, at most once.
    ///
    /// # Errors
    /// Nothing is sent then. [`Refusal::Away`] where the same READ may succeed later.
    pub fn read(&self, flight: &Flight, send: impl FnOnce(&[u8])) -> Result<(), Refusal> {
        let mut send = Some(send);
        let mut send = |bytes: &[u8]| {
            if let Some(send) = send.take() {
                flight.replying();
                send(bytes);
            }
        };
        let asked = flight.asked();
        match self.tree.node(asked.ino)? {
            Node::File(digest, file, _) => {
                flight.stamp(Phase::Decoding);
                self.file(&digest, file, asked.offset, asked.size, &mut send)
            }
            Node::Manifest(digest) => {
                let text = self.tree.template(&digest)?.manifest_json();
                let begin = (asked.offset as usize).min(text.len());
                let end = begin.saturating_add(asked.size as usize).min(text.len());
                send(&text.as_bytes()[begin..end]);
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
                // Its blocks may have been moved since it was opened; a second failure is the answer.
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
