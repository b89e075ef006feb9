//! Writes a stream. Every block is verified before it is written, and is written as it is stored.

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::format::PackId;
use crate::store::format::pack::IndexEntry;
use crate::store::format::stream::{MAX_TAGS, MAX_TEMPLATES, StreamFront, StreamTemplate};
use crate::store::write::ordered::{BATCH_BLOCKS, ordered};
use crate::store::{BLOCK_SIZE, Digest, Scratch, Store, TagName, Template};
use crate::units::{Bytes, to_usize};

/// Options of a save. The caller must prevent the removal of the templates.
#[derive(Debug, Clone, Default)]
pub struct SaveRequest {
    /// Templates, each with the tags to save.
    pub templates: Vec<(Digest, Vec<TagName>)>,
    /// Base templates, which the receiving store has; their blocks are left out.
    pub without: Vec<Digest>,
    /// Set to true to interrupt the save.
    pub interrupt: Option<Arc<AtomicBool>>,
}

/// Result of saving one template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SavedTemplate {
    /// Digest of the template.
    pub digest: Digest,
    /// Saved tags.
    pub tags: Vec<TagName>,
}

/// Result of a save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Templates in the stream.
    pub templates: Vec<SavedTemplate>,
    /// Base templates that the receiving store must have.
    #[serde(rename = "without_digests")]
    pub without: Vec<Digest>,
    /// Blocks in the stream, each once.
    pub blocks: u64,
    /// Bytes of the blocks before compression.
    pub block_bytes: Bytes,
    /// Length of the stream in bytes.
    pub stream_bytes: Bytes,
}

/// A block of the templates to save.
#[derive(Clone, Copy)]
struct BlockRef {
    template: u32,
    file: u32,
    block: u64,
}

impl Store {
    /// Writes templates to `out`. Error messages call the stream `name`. After an error the stream is incomplete, and
    /// `load` rejects it.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if a template does not exist,
    /// [`Code::Damage`](crate::error::Code) if a template is damaged, or an error if `out` cannot be written or the
    /// save is interrupted.
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
                    policy_length: u32::try_from(policy.len()).unwrap_or(u32::MAX),
                    tags: saved.tags.clone(),
                })
                .collect(),
            without: request.without.clone(),
            blocks: blocks.len() as u64,
        };
        let front = front.encode().map_err(|_| {
            Error::usage(format!(
                "cannot save: the limits of a stream are {MAX_TEMPLATES} templates, {MAX_TEMPLATES} base templates and \
                 {MAX_TAGS} tags"
            ))
            .at(name)
            .hint("save fewer templates in one stream")
        })?;
        let stop = AtomicBool::new(false);
        let check = || match &request.interrupt {
            Some(interrupt) if interrupt.load(Ordering::Relaxed) => {
                Err(Error::failed("interrupted; the stream is incomplete"))
            }
            _ if stop.load(Ordering::Relaxed) => Err(Error::failed("save stopped")),
            _ => Ok(()),
        };
        let mut out = Outgoing { out, name, hasher: blake3::Hasher::new(), length: 0 };
        let block_bytes = Bytes::new(blocks.len() as u64 * BLOCK_SIZE);
        progress.start("save", Some(block_bytes));
        out.write(&front)?;
        for (template, policy) in templates.iter().zip(&policies) {
            out.write(policy)?;
            template.read_image(|part| check().and_then(|()| out.write(part)))?;
        }
        let sent = ordered(
            &stop,
            |send| blocks.chunks(BATCH_BLOCKS).try_for_each(|batch| check().and_then(|()| send(batch))),
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

/// Merges the requests for each template into one with all its tags. A tag that is requested twice keeps its first
/// position.
fn merge(templates: &[(Digest, Vec<TagName>)]) -> Vec<SavedTemplate> {
    let mut merged: Vec<SavedTemplate> = Vec::new();
    let mut seen = HashSet::new();
    for (digest, tags) in templates {
        let new_tags: Vec<TagName> = tags.iter().filter(|t| seen.insert((*t).clone())).cloned().collect();
        match merged.iter_mut().find(|t| t.digest == *digest) {
            Some(template) => template.tags.extend(new_tags),
            None => merged.push(SavedTemplate { digest: *digest, tags: new_tags }),
        }
    }
    merged
}

/// Returns the blocks to save. Equal blocks are recognized by their place, so a block that is stored twice may be saved
/// twice.
fn distinct(templates: &[Template], without: &[Template]) -> Result<Vec<BlockRef>> {
    let mut numbers: HashMap<PackId, u32> = HashMap::new();
    let mut seen: HashSet<u64> = HashSet::new();
    let mut blocks = Vec::new();
    for (index, template) in without.iter().map(|t| (None, t)).chain((0..).map(Some).zip(templates)) {
        for (number, file) in (0..).zip(0..template.files().len()) {
            for block in 0..template.block_count(file) {
                let Some((_, pack, stored)) = template.place(file, block)? else { continue };
                let next = u32::try_from(numbers.len())
                    .map_err(|_| Error::failed("the templates are in too many packs for one stream"))?;
                let pack = *numbers.entry(pack).or_insert(next);
                if seen.insert(u64::from(pack) << 32 | u64::from(stored.offset))
                    && let Some(template) = index
                {
                    blocks.push(BlockRef { template, file: number, block });
                }
            }
        }
    }
    Ok(blocks)
}

/// Returns the bytes of these blocks in the stream, and the number of blocks.
fn records(templates: &[Template], batch: &[BlockRef], scratch: &mut Scratch) -> Result<(Vec<u8>, usize)> {
    let mut bytes = Vec::with_capacity(BATCH_BLOCKS * to_usize(BLOCK_SIZE) / 2);
    for at in batch {
        let start = bytes.len();
        bytes.resize(start + IndexEntry::LEN, 0);
        let template = &templates[at.template as usize];
        let record = template.read_record(at.file as usize, at.block, scratch, &mut bytes)?;
        let (hash, mut stored) = record.ok_or_else(|| {
            Error::failed("a template changed while being saved").hint("run the command again")
        })?;
        stored.offset = 0;
        let mut entry = Vec::with_capacity(IndexEntry::LEN);
        IndexEntry { hash, stored }.encode(&mut entry);
        bytes[start..start + IndexEntry::LEN].copy_from_slice(&entry);
    }
    Ok((bytes, batch.len()))
}

/// A stream being written.
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
        let first = if full { "free space on that file system; then  " } else { "" };
        Error::io("cannot write stream", self.name, error).hint(format!(
            "{first}save the templates again: the written stream is incomplete, and 'stencil load' rejects it"
        ))
    }

    /// Ends the stream with the hash of all bytes before, and returns its length.
    fn finish(mut self) -> Result<Bytes> {
        let hash = *self.hasher.finalize().as_bytes();
        self.write(&hash)?;
        self.out.flush().map_err(|e| self.error(e))?;
        Ok(Bytes::new(self.length))
    }
}
