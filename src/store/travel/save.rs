//! Writing a stream. Every block is verified before it leaves, and leaves as it is stored.

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::BATCH;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::format::PackId;
use crate::store::format::pack::IndexEntry;
use crate::store::format::stream::{StreamFront, StreamTemplate};
use crate::store::ordered::ordered;
use crate::store::{BLOCK_SIZE, Digest, Scratch, Store, TagName, Template};
use crate::units::Bytes;

/// What is to be saved. The caller sees to it that nothing of it is removed meanwhile.
#[derive(Debug, Clone, Default)]
pub struct SaveRequest {
    /// Templates, each with the tags that travel along.
    pub templates: Vec<(Digest, Vec<TagName>)>,
    /// Templates that the reader has: their blocks are left out.
    pub without: Vec<Digest>,
    /// Becomes true when the work is to stop.
    pub interrupt: Option<Arc<AtomicBool>>,
}

/// A template that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SavedTemplate {
    /// Its identity.
    pub digest: Digest,
    /// Tags that travel along.
    pub tags: Vec<TagName>,
}

/// A stream that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// What is in it.
    pub templates: Vec<SavedTemplate>,
    /// What its reader must have.
    pub without: Vec<Digest>,
    /// Blocks in it, each once.
    pub blocks: u64,
    /// Their size before compression.
    pub block_bytes: Bytes,
    /// Length of the stream.
    pub stream_bytes: Bytes,
}

/// A block of the templates that are saved.
#[derive(Clone, Copy)]
struct Which {
    template: u32,
    file: u32,
    block: u64,
}

impl Store {
    /// Writes templates to `out`, which is called `name` in errors. What was written before an error is no whole
    /// stream, and a reader refuses it.
    ///
    /// # Errors
    /// [`Code::NotFound`](crate::error::Code), [`Code::Damage`](crate::error::Code), what the system says about `out`,
    /// or that it was interrupted.
    pub fn save(
        &self,
        request: &SaveRequest,
        (out, name): (&mut (dyn Write + Send), &Path),
        progress: &dyn Progress,
    ) -> Result<Saved> {
        let requested = merge(&request.templates);
        let open = |digest: &Digest| self.template(digest);
        let templates: Vec<Template> = requested.iter().map(|t| open(&t.digest)).collect::<Result<_>>()?;
        let without: Vec<Template> = request.without.iter().map(open).collect::<Result<_>>()?;
        let blocks = distinct(&templates, &without)?;
        let policies: Vec<Vec<u8>> = templates.iter().map(|t| t.policy().encode()).collect::<Result<_>>()?;
        let front = StreamFront {
            templates: requested
                .iter()
                .zip(&templates)
                .zip(&policies)
                .map(|((saved, template), policy)| StreamTemplate {
                    digest: saved.digest,
                    image_length: template.image_length(),
                    policy_length: policy.len() as u32,
                    tags: saved.tags.clone(),
                })
                .collect(),
            without: request.without.clone(),
            blocks: blocks.len() as u64,
        };
        let front = front.encode().map_err(|e| {
            e.in_file("stream", name).remedy("save fewer templates at a time, each with its own stream")
        })?;
        let stop = AtomicBool::new(false);
        let stopped = || match &request.interrupt {
            Some(wanted) if wanted.load(Ordering::Relaxed) => {
                Err(Error::failed("interrupted: nothing whole was saved"))
            }
            _ if stop.load(Ordering::Relaxed) => Err(Error::failed("stopped")),
            _ => Ok(()),
        };
        let mut out = Outgoing { out, name, hasher: blake3::Hasher::new(), length: 0 };
        let block_bytes = Bytes::new(blocks.len() as u64 * BLOCK_SIZE);
        progress.start("save", Some(block_bytes));
        out.write(&front)?;
        for (template, policy) in templates.iter().zip(&policies) {
            out.write(policy)?;
            template.read_image(|part| stopped().and_then(|()| out.write(part)))?;
        }
        let mut batches = blocks.chunks(BATCH);
        let sent = ordered(
            &stop,
            || stopped().map(|()| batches.next()),
            Scratch::default,
            |scratch, batch| records(&templates, batch, scratch),
            |(bytes, count)| {
                out.write(&bytes)?;
                progress.advance(Bytes::new(count as u64 * BLOCK_SIZE));
                Ok(())
            },
        );
        progress.finish();
        sent?;
        let stream_bytes = out.finish()?;
        Ok(Saved {
            templates: requested,
            without: request.without.clone(),
            blocks: blocks.len() as u64,
            block_bytes,
            stream_bytes,
        })
    }
}

/// Each template once, with all its tags; a tag that was asked for twice stays where it was first.
fn merge(templates: &[(Digest, Vec<TagName>)]) -> Vec<SavedTemplate> {
    let mut merged: Vec<SavedTemplate> = Vec::new();
    let mut seen = HashSet::new();
    for (digest, tags) in templates {
        let fresh: Vec<TagName> = tags.iter().filter(|t| seen.insert((*t).clone())).cloned().collect();
        match merged.iter_mut().find(|t| t.digest == *digest) {
            Some(template) => template.tags.extend(fresh),
            None => merged.push(SavedTemplate { digest: *digest, tags: fresh }),
        }
    }
    merged
}

/// The blocks to send. Equal blocks are known by their place: one that is stored twice may be sent twice.
fn distinct(templates: &[Template], without: &[Template]) -> Result<Vec<Which>> {
    let mut numbers: HashMap<PackId, u32> = HashMap::new();
    let mut seen: HashSet<u64> = HashSet::new();
    let mut blocks = Vec::new();
    for (index, template) in without.iter().map(|t| (None, t)).chain((0..).map(Some).zip(templates)) {
        for file in 0..template.files().len() {
            for block in 0..template.block_count(file) {
                let Some((_, pack, stored)) = template.place(file, block)? else { continue };
                let next = numbers.len() as u32;
                let pack = *numbers.entry(pack).or_insert(next);
                if seen.insert(u64::from(pack) << 32 | u64::from(stored.offset))
                    && let Some(template) = index
                {
                    blocks.push(Which { template, file: file as u32, block });
                }
            }
        }
    }
    Ok(blocks)
}

/// The bytes of these blocks in the stream, and how many blocks they are.
fn records(templates: &[Template], batch: &[Which], scratch: &mut Scratch) -> Result<(Vec<u8>, usize)> {
    let mut bytes = Vec::with_capacity(BATCH * BLOCK_SIZE as usize / 2);
    for which in batch {
        let start = bytes.len();
        bytes.resize(start + IndexEntry::LEN, 0);
        let template = &templates[which.template as usize];
        let record = template.read_record(which.file as usize, which.block, scratch, &mut bytes)?;
        let (hash, mut stored) = record.ok_or_else(|| {
            Error::failed("a template has changed while it was saved").remedy("run it again")
        })?;
        stored.offset = 0;
        let mut entry = Vec::with_capacity(IndexEntry::LEN);
        IndexEntry { hash, stored }.encode(&mut entry);
        bytes[start..start + IndexEntry::LEN].copy_from_slice(&entry);
    }
    Ok((bytes, batch.len()))
}

/// The stream on its way out.
struct Outgoing<'a> {
    out: &'a mut (dyn Write + Send),
    name: &'a Path,
    hasher: blake3::Hasher,
    length: u64,
}

impl Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| self.error(e))
    }

    fn error(&self, error: std::io::Error) -> Error {
        let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let first = if full { "free space on that filesystem; " } else { "" };
        Error::io("cannot write the stream", self.name, error).remedy(format!(
            "{first}what was written is no whole stream, stencil load refuses it: save it again"
        ))
    }

    /// Ends the stream with the hash of all before, and gives its length.
    fn finish(mut self) -> Result<Bytes> {
        let hash = *self.hasher.finalize().as_bytes();
        self.write(&hash)?;
        self.out.flush().map_err(|e| self.error(e))?;
        Ok(Bytes::new(self.length))
    }
}
