//! Loads a stream: every block is verified before it is written, and nothing is visible before the commit.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use super::incoming::{Incoming, StreamSource, damaged};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::disk::pack::{PackFile, pack_path};
use crate::store::disk::path::StorePath;
use crate::store::disk::publish::create;
use crate::store::disk::session::Session;
use crate::store::format::Invalid;
use crate::store::format::image::{HASH_LEN, ImageHeader};
use crate::store::format::pack::IndexEntry;
use crate::store::format::stream::{StreamFront, StreamTemplate, decode_entry};
use crate::store::format::template_file::MANIFEST;
use crate::store::names::owner::READ_BITS;
use crate::store::names::policy::MAX_LENGTH;
use crate::store::read::tree::{SEGMENT, TreeWriter};
use crate::store::write::block_index::{BlockIndex, Place};
use crate::store::write::commit::{Finished, commit, fresh_policy};
use crate::store::write::ordered::{BATCH_BLOCKS, ordered};
use crate::store::write::pack_writer::{PackWriter, Packed};
use crate::store::write::tables::{TableWriter, Tables};
use crate::store::{
    BLOCK_SIZE, Digest, Moved, Owner, Policy, Scratch, Store, TagName, TemplateFile, WorkingSet, check_name,
};
use crate::units::{Bytes, to_usize};

/// Maximum number of image hashes that are looked up in one batch.
const HASH_BATCH: usize = 256;

/// Options of a load.
#[derive(Debug, Clone, Default)]
pub struct LoadRequest {
    /// Permission bits of the files, instead of those in the stream or the store.
    pub mode: Option<u32>,
    /// User and group of the files, instead of those in the stream or the store.
    pub owner: Owner,
    /// Drop the launch recipes, which are command lines that `clone` runs.
    pub without_recipes: bool,
    /// Drop the tags, which may point at other templates in this store.
    pub without_tags: bool,
}

/// Result of loading one template.
#[derive(Debug, Clone, Serialize)]
pub struct LoadedTemplate {
    /// Digest of the template, the same as in the store that saved it.
    pub digest: Digest,
    /// Tags that point at the template now.
    pub tags: Vec<TagName>,
    /// Files of the template.
    pub files: Vec<TemplateFile>,
    /// True if the store already had this content; the template then keeps its mode, owner, labels, recipe and working
    /// sets.
    pub existed: bool,
    /// Tags that pointed at other templates before.
    pub moved: Vec<Moved>,
    /// True if a launch recipe was added to the store with the template.
    pub recipe: bool,
}

/// Result of a load.
#[derive(Debug, Clone, Serialize)]
pub struct Loaded {
    /// Templates in the stream.
    pub templates: Vec<LoadedTemplate>,
    /// Blocks in the stream.
    pub blocks: u64,
    /// Blocks in the stream that the store already had.
    pub skipped_blocks: u64,
    /// Bytes of blocks that were new in the store, before compression.
    pub new_bytes: Bytes,
    /// Bytes that were added to packs.
    pub stored_bytes: Bytes,
    /// Number of damaged blocks that were stored again.
    pub repaired_blocks: u64,
    /// Length of the stream in bytes.
    pub stream_bytes: Bytes,
}

/// Consecutive blocks of the stream.
struct Batch {
    bytes: Vec<u8>,
    blocks: Vec<(IndexEntry, Range<usize>)>,
    /// Offset of the first block in the stream.
    offset: u64,
}

/// A template whose policy and image were received.
struct Received {
    image: StorePath,
    header: ImageHeader,
    policy: Policy,
}

impl Store {
    /// Loads the templates of a stream with their tags. A tag that points at another template is moved, as by an
    /// import.
    ///
    /// The stream is verified while it is read, and nothing is visible before the whole stream was read. Nothing
    /// remains of a failed or interrupted load, unless publishing itself fails: then the error lists what was
    /// published, and everything published is complete.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if the stream is truncated or changed,
    /// [`Code::NotFound`](crate::error::Code) if the stream was saved without blocks that the store does not have,
    /// [`Code::TryAgain`](crate::error::Code) if the stream stalls, or an error if a system call fails or the load is
    /// interrupted.
    pub fn load(&self, incoming: Incoming, request: &LoadRequest, progress: &dyn Progress) -> Result<Loaded> {
        let Incoming { front, mut source } = incoming;
        if let Some(base) = front.without.iter().find(|base| !self.has(base)) {
            return Err(Error::not_found(format!(
                "the stream was saved without the blocks of template {base}, which this store does not have"
            ))
            .at(self.dir())
            .hint("load that template first, or save again without '--without'"));
        }
        self.repair()?;
        let _content = self.lock_content(|| source.check())?;
        let session = Session::create(&self.tmp_dir())?;
        let index = BlockIndex::load(self)?;
        progress.start("load", Some(Bytes::new(front.blocks.saturating_mul(BLOCK_SIZE))));
        let done = self.receive(&front, &mut source, &session, &index, progress);
        progress.finish();
        let (received, packed, skipped) = done?;

        let change = |policy: &mut Policy| request.apply(policy);
        let mut finished = Vec::new();
        let mut tables = Vec::new();
        for (number, (template, received)) in front.templates.iter().zip(&received).enumerate() {
            let directory = session.path().join(format!("image-{number}"));
            tables.push(self.tables(&directory, (template, received), &front, &source, &session, &index)?);
            finished.push(Finished {
                digest: template.digest,
                directory,
                policy: new_policy(&received.policy, request),
                change: &change,
                tags: request.tags(template),
            });
        }
        source.check()?;
        let (committed, is_published) =
            commit(self, &session, &packed, &finished, &index, &|| source.check())?;
        let packed = if is_published { packed } else { Packed::default() };
        let templates =
            finished.iter().zip(tables).zip(committed).map(|((template, tables), done)| LoadedTemplate {
                digest: template.digest,
                tags: template.tags.clone(),
                files: tables.files,
                existed: done.existed,
                moved: done.moved,
                recipe: !done.existed && template.policy.recipe.is_some(),
            });
        Ok(Loaded {
            templates: templates.collect(),
            blocks: front.blocks,
            skipped_blocks: skipped,
            new_bytes: Bytes::new(packed.new_bytes),
            stored_bytes: Bytes::new(packed.stored_bytes),
            repaired_blocks: index.repaired(),
            stream_bytes: Bytes::new(source.offset()),
        })
    }

    /// Receives the whole stream into the session. Returns the templates, the new packs, and the number of blocks that
    /// the store already had.
    fn receive(
        &self,
        front: &StreamFront,
        source: &mut StreamSource,
        session: &Session,
        index: &BlockIndex,
        progress: &dyn Progress,
    ) -> Result<(Vec<Received>, Packed, u64)> {
        let mut received = Vec::with_capacity(front.templates.len());
        for (number, template) in front.templates.iter().enumerate() {
            let path = session.path().join(format!("image-{number}.received"));
            received.push(receive_template(template, source, path)?);
        }
        let limit = received.iter().fold(0, |sum: u64, r| sum.saturating_add(r.header.block_count()));
        if front.blocks > limit {
            let announced = front.blocks;
            return Err(
                source.damaged(format!("the stream announces {announced} blocks, expected at most {limit}"))
            );
        }
        let mut hashes = HashSet::new();
        let mut packs = PackWriter::new(session.path(), index);
        let (mut left, mut skipped) = (front.blocks, 0);
        let stop = source.stop.clone();
        let name = source.name().to_owned();
        ordered(
            &stop,
            |send| {
                while let Some(batch) = read_batch(source, &mut left)? {
                    send(batch)?;
                }
                Ok(())
            },
            Scratch::default,
            |scratch, batch| check_batch(batch, index, scratch).map_err(|why| damaged(&name, why)),
            |(batch, existing)| {
                for ((entry, range), exists) in batch.blocks.into_iter().zip(existing) {
                    hashes.insert(entry.hash);
                    // Two workers may have checked the same new block in different batches.
                    if exists || index.find_written(&entry.hash).is_some() {
                        skipped += 1;
                    } else {
                        packs.append(entry.hash, &batch.bytes[range], entry.stored)?;
                    }
                    progress.advance(Bytes::new(BLOCK_SIZE));
                }
                Ok(())
            },
        )?;
        source.finish()?;
        reject_unreferenced(&received, hashes, source)?;
        Ok((received, packs.finish()?, skipped))
    }

    /// Writes the tables of a template: its image, and the place of each block in this store.
    fn tables(
        &self,
        directory: &StorePath,
        (template, received): (&StreamTemplate, &Received),
        front: &StreamFront,
        source: &StreamSource,
        session: &Session,
        index: &BlockIndex,
    ) -> Result<Tables> {
        let missing = |hash: &Digest, file: &str| match front.without.is_empty() {
            true => source.damaged(format!("missing block {hash} of file '{file}'")),
            false => Error::not_found(format!(
                "block {hash} of file '{file}' is neither in the stream nor readable in the base templates \
                 (`--without`)"
            ))
            .at(self.dir())
            .hint("run 'stencil verify' to find damage in this store, or save again without '--without'"),
        };
        let files = received.header.files();
        let mut tables = TableWriter::new(directory, files.iter().map(|f| (f.name.clone(), f.kind)))?;
        let mut image = ImageReader::open(&received.image, files.len())?;
        for file in files {
            let mut left = file.blocks();
            let mut last = None;
            ordered(
                &source.stop,
                |send| {
                    while let Some(hashes) = source.check().and_then(|()| image.next(&mut left))? {
                        send(hashes)?;
                    }
                    Ok(())
                },
                Scratch::default,
                |scratch, hashes: Vec<Digest>| {
                    let place = |hash: Digest| match hash == ZERO {
                        true => Ok((hash, None)),
                        false => match index.find(&hash, scratch) {
                            Some(place) => Ok((hash, Some(place))),
                            None => Err(missing(&hash, &file.name)),
                        },
                    };
                    hashes.into_iter().map(place).collect::<Result<Vec<_>>>()
                },
                |places| {
                    for (hash, place) in places {
                        last = place.map(|place| (hash, place));
                        match place {
                            Some(place) => tables.block(&hash, place)?,
                            None => tables.zeros(1)?,
                        }
                    }
                    Ok(())
                },
            )?;
            if let Some((hash, place)) = last {
                let length = to_usize(file.size - (file.blocks() - 1) * BLOCK_SIZE);
                if !self.ends_in_zeros(&hash, place, length, session)? {
                    return Err(
                        source.damaged(format!("file '{}' has nonzero bytes beyond its end", file.name))
                    );
                }
            }
            tables.end_file(file.size);
        }
        let tables = tables.finish()?;
        match tables.digest == template.digest {
            true => Ok(tables),
            false => Err(source.damaged(format!(
                "image of template {} is not in canonical form: the canonical image has digest {}",
                template.digest, tables.digest
            ))),
        }
    }

    /// Returns true if a block, stored here or in the session, has only zeros after its first `length` bytes. Other
    /// bytes would give one content two digests.
    fn ends_in_zeros(&self, hash: &Digest, place: Place, length: usize, session: &Session) -> Result<bool> {
        if length as u64 == BLOCK_SIZE {
            return Ok(true);
        }
        let mut scratch = Scratch::default();
        let new_pack = pack_path(session.path(), place.pack);
        let pack = match new_pack.exists() {
            true => Arc::new(PackFile::open(new_pack, place.pack)?),
            false => self.pack(place.pack)?,
        };
        scratch.verify(&pack, place.stored, hash)?;
        Ok(scratch.plain()[length..].iter().all(|b| *b == 0))
    }
}

const ZERO: Digest = Digest::new([0; 32]);

impl LoadRequest {
    /// Returns the tags to point at a template.
    fn tags(&self, template: &StreamTemplate) -> Vec<TagName> {
        if self.without_tags { Vec::new() } else { template.tags.clone() }
    }

    fn apply(&self, policy: &mut Policy) {
        policy.mode = self.mode.unwrap_or(policy.mode);
        self.owner.apply(policy);
    }
}

/// Returns the policy of a template that is new in this store: the one from the stream, with the current time of
/// creation.
fn new_policy(policy: &Policy, request: &LoadRequest) -> Policy {
    let recipe = policy.recipe.clone().filter(|_| !request.without_recipes);
    Policy { created: fresh_policy().created, recipe, ..policy.clone() }
}

/// Receives the policy and the image of a template; writes the image to `path`.
fn receive_template(
    template: &StreamTemplate,
    source: &mut StreamSource,
    path: StorePath,
) -> Result<Received> {
    let digest = template.digest;
    let what = format!("the policy of template {digest}");
    if u64::from(template.policy_length) > MAX_LENGTH {
        return Err(source.damaged(format!("{what} is too large: {} bytes", template.policy_length)));
    }
    let mut bytes = vec![0; template.policy_length as usize];
    source.exact(&mut bytes, &what)?;
    let policy = Policy::decode(&bytes).map_err(|e| source.invalid(e, &what))?;
    if let Some(field) = policy.unknown.keys().next() {
        // The field may hold data that `--no-recipes` should drop.
        return Err(source.invalid(Invalid::Newer(format!("unsupported field '{field}'")), &what));
    }
    for (name, set) in &policy.working_sets {
        check_name("name of a working set", name).map_err(|e| source.damaged(format!("{what}: {e}")))?;
        WorkingSet::decode(set).map_err(|e| source.invalid(e, &what))?;
    }
    if policy.mode & !READ_BITS != 0 || policy.uid == u32::MAX || policy.gid == u32::MAX {
        let Policy { mode, uid, gid, .. } = policy;
        return Err(
            source.damaged(format!("{what} has invalid permissions: mode {mode:o}, user {uid}, group {gid}"))
        );
    }

    let what = format!("the image of template {digest}");
    let fail = |e| Error::io("cannot write", &path, e);
    let mut file = BufWriter::new(create(&path)?);
    let mut tree = TreeWriter::default();
    let (mut left, mut head) = (template.image_length, Vec::new());
    let mut part = vec![0; to_usize(SEGMENT)];
    while left > 0 {
        let now = left.min(SEGMENT) as usize;
        source.exact(&mut part[..now], &what)?;
        if head.is_empty() {
            // An impossible image is not written. The header is trusted only after the image's hash is verified.
            head = part[..now].to_vec();
            let header = ImageHeader::decode(&head).map_err(|e| source.invalid(e, &what))?;
            if header.image_length() != template.image_length {
                let (got, length) = (template.image_length, header.image_length());
                return Err(source.damaged(format!("length of {what} is {got}, expected {length} bytes")));
            }
        }
        tree.update(&part[..now]);
        file.write_all(&part[..now]).map_err(fail)?;
        left -= now as u64;
    }
    file.flush().map_err(fail)?;
    let (_, got) = tree.finish();
    if got != digest {
        return Err(source.damaged(format!("{what} has hash {got}, expected {digest}")));
    }
    let header = ImageHeader::decode(&head).map_err(|e| source.invalid(e, &what))?;
    for file in header.files() {
        if file.name == MANIFEST || !file.kind.can_have(file.size) {
            let (name, kind, size) = (&file.name, file.kind.name(), file.size);
            return Err(
                source.damaged(format!("{what} has an invalid file '{name}' of kind {kind} and size {size}"))
            );
        }
    }
    Ok(Received { image: path, header, policy })
}

/// Reads the next blocks of the stream.
fn read_batch(source: &mut StreamSource, left: &mut u64) -> Result<Option<Batch>> {
    if *left == 0 {
        return Ok(None);
    }
    let mut batch = Batch { bytes: Vec::new(), blocks: Vec::new(), offset: source.offset() };
    for _ in 0..BATCH_BLOCKS.min(usize::try_from(*left).unwrap_or(BATCH_BLOCKS)) {
        let mut bytes = [0; IndexEntry::LEN];
        source.exact(&mut bytes, "a block")?;
        let entry = decode_entry(&bytes).map_err(|e| source.invalid(e, "a block"))?;
        let start = batch.bytes.len();
        batch.bytes.resize(start + entry.stored.length as usize, 0);
        source.exact(&mut batch.bytes[start..], "a block")?;
        batch.blocks.push((entry, start..batch.bytes.len()));
        *left -= 1;
    }
    Ok(Some(batch))
}

/// Verifies each block. Returns for each block whether the store already has it.
fn check_batch(
    batch: Batch,
    index: &BlockIndex,
    scratch: &mut Scratch,
) -> std::result::Result<(Batch, Vec<bool>), String> {
    let mut existing = Vec::with_capacity(batch.blocks.len());
    for (entry, range) in &batch.blocks {
        scratch.check(&batch.bytes[range.clone()], entry.stored, &entry.hash).map_err(|why| {
            format!("block {} after offset {} cannot be verified: {why}", entry.hash, batch.offset)
        })?;
        existing.push(index.find(&entry.hash, scratch).is_some());
    }
    Ok((batch, existing))
}

/// Rejects blocks that no image references: they would never be read, and the sender could learn whether the store has
/// them.
fn reject_unreferenced(
    received: &[Received],
    mut unreferenced: HashSet<Digest>,
    source: &mut StreamSource,
) -> Result<()> {
    for template in received {
        let mut image = ImageReader::open(&template.image, template.header.files().len())?;
        let mut left = template.header.block_count();
        while let Some(hashes) = image.next(&mut left)? {
            source.check()?;
            for hash in hashes {
                unreferenced.remove(&hash);
            }
        }
    }
    match unreferenced.iter().next() {
        None => Ok(()),
        Some(hash) => {
            let count = unreferenced.len();
            Err(source.damaged(format!("blocks without a reference in an image: {count}, among them {hash}")))
        }
    }
}

/// Reads the block hashes of a received image.
struct ImageReader {
    file: BufReader<File>,
    path: StorePath,
}

impl ImageReader {
    fn open(path: &StorePath, files: usize) -> Result<ImageReader> {
        let open = || {
            let mut file = path.file()?;
            file.seek(SeekFrom::Start(ImageHeader::table_offset(files)))?;
            Ok(file)
        };
        let file = open().map_err(|e| Error::io("cannot read", path, e))?;
        Ok(ImageReader { file: BufReader::new(file), path: path.clone() })
    }

    /// Returns the next hashes of a file with `left` remaining hashes, or `None` at its end.
    fn next(&mut self, left: &mut u64) -> Result<Option<Vec<Digest>>> {
        let now = (*left).min(HASH_BATCH as u64);
        *left -= now;
        let mut bytes = vec![0; to_usize(now * HASH_LEN)];
        self.file.read_exact(&mut bytes).map_err(|e| Error::io("cannot read", &self.path, e))?;
        let hashes: Vec<Digest> = bytes.as_chunks::<32>().0.iter().map(|hash| Digest::new(*hash)).collect();
        Ok((!hashes.is_empty()).then_some(hashes))
    }
}
