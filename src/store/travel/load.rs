//! Loading a stream: every block is verified before it is written, nothing is visible before the commit.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use super::incoming::{StreamSource, damaged};
use super::{BATCH, Incoming};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::commit::{Finished, commit, fresh_policy};
use crate::store::format::Invalid;
use crate::store::format::image::{HASH_LEN, ImageHeader};
use crate::store::format::pack::IndexEntry;
use crate::store::format::stream::{StreamFront, StreamTemplate, decode_entry};
use crate::store::image::MANIFEST;
use crate::store::known::{Known, Place};
use crate::store::ordered::ordered;
use crate::store::owner::READ_BITS;
use crate::store::pack::{PackFile, pack_path};
use crate::store::pack_writer::{PackWriter, Packed};
use crate::store::path::StorePath;
use crate::store::policy::MAX_LENGTH;
use crate::store::publish::create;
use crate::store::session::Session;
use crate::store::tables::{TableWriter, Tables};
use crate::store::tree::{SEGMENT, TreeWriter};
use crate::store::{BLOCK_SIZE, Digest, Owner, Policy, Scratch, Store, TagName, TemplateFile};
use crate::units::Bytes;

/// Hashes of an image that are looked up together.
const HASHES: usize = 256;

/// What is to be done with a stream.
#[derive(Debug, Clone, Default)]
pub struct LoadRequest {
    /// Permission bits of the files, in place of what the stream or the store says.
    pub mode: Option<u32>,
    /// User and group of the files, in place of what the stream or the store says.
    pub owner: Owner,
    /// Leaves out the launch recipes: they are command lines that `clone` runs.
    pub without_recipes: bool,
    /// Leaves out the tags: they may point elsewhere in this store.
    pub without_tags: bool,
}

/// A tag that pointed elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// The tag.
    pub tag: TagName,
    /// Where it pointed before.
    pub from: Digest,
}

/// A template that was loaded.
#[derive(Debug, Clone, Serialize)]
pub struct LoadedTemplate {
    /// Its identity, the same as where it was saved.
    pub digest: Digest,
    /// Tags that point at it now.
    pub tags: Vec<TagName>,
    /// Its files.
    pub files: Vec<TemplateFile>,
    /// True when the store had this content already; then its mode, owner, labels and recipe stayed as they were.
    pub existed: bool,
    /// Tags that pointed at other templates before.
    pub moved: Vec<Moved>,
    /// True when a launch recipe came with it into the store.
    pub recipe: bool,
}

/// A stream that was loaded.
#[derive(Debug, Clone, Serialize)]
pub struct Loaded {
    /// What was in it.
    pub templates: Vec<LoadedTemplate>,
    /// Blocks that came.
    pub blocks: u64,
    /// Those of them that the store had already.
    pub skipped_blocks: u64,
    /// Bytes of blocks that are new in the store, before compression.
    pub new_bytes: Bytes,
    /// Bytes that were added to packs.
    pub stored_bytes: Bytes,
    /// Blocks that the store had, but damaged; they were stored anew.
    pub repaired_blocks: u64,
    /// Length of the stream.
    pub stream_bytes: Bytes,
}

/// Blocks as they came.
struct Batch {
    bytes: Vec<u8>,
    blocks: Vec<(IndexEntry, Range<usize>)>,
    /// Where in the stream it begins.
    offset: u64,
}

/// A template of which everything but the blocks has come.
struct Received {
    image: StorePath,
    header: ImageHeader,
    policy: Policy,
}

impl Store {
    /// Loads the templates of a stream, with their tags; a tag that points elsewhere is moved, as an import does.
    ///
    /// Everything is verified while it comes, and nothing is visible before all has come. When it fails or is interrupted
    /// nothing is left, unless publishing itself fails: then the error says how far it came, and what is there is whole.
    ///
    /// # Errors
    /// [`Code::Damage`](crate::error::Code) when the stream is cut short or was changed, [`Code::NotFound`](crate::error::Code) when it was saved without blocks
    /// that the store lacks, [`Code::TryAgain`](crate::error::Code) when it falls silent, what the system says, or that it
    /// was interrupted.
    pub fn load(&self, incoming: Incoming, request: &LoadRequest, progress: &dyn Progress) -> Result<Loaded> {
        let Incoming { front, mut source } = incoming;
        if let Some(base) = front.without.iter().find(|base| !self.has(base)) {
            return Err(Error::not_found(format!(
                "the stream was saved without the blocks of template {base}, which this store does not have"
            ))
            .at(self.dir())
            .remedy("load that template first, or save again without --without"));
        }
        self.mend()?;
        let _content = self.lock_content(|| source.check())?;
        let session = Session::begin(&self.tmp_dir())?;
        let known = Known::load(self)?;
        progress.start("load", Some(Bytes::new(front.blocks.saturating_mul(BLOCK_SIZE))));
        let done = self.receive(&front, &mut source, &session, &known, progress);
        progress.finish();
        let (received, packed, skipped) = done?;

        let change = |policy: &mut Policy| request.apply(policy);
        let mut finished = Vec::new();
        let mut tables = Vec::new();
        for (number, (template, received)) in front.templates.iter().zip(&received).enumerate() {
            let folder = session.path().join(format!("image-{number}"));
            tables.push(self.tables(&folder, (template, received), &front, &source, &session, &known)?);
            finished.push(Finished {
                digest: template.digest,
                folder,
                policy: arrived(&received.policy, request),
                change: &change,
                tags: request.tags(template),
            });
        }
        source.check()?;
        let (committed, needed) = commit(self, &session, &packed, &finished, &known, &|| source.check())?;
        let packed = if needed { packed } else { Packed::default() };
        let templates = finished.iter().zip(tables).zip(committed).map(|((template, tables), done)| {
            let moved = done.moved.into_iter().map(|(tag, from)| Moved { tag, from }).collect();
            LoadedTemplate {
                digest: template.digest,
                tags: template.tags.clone(),
                files: tables.files,
                existed: done.existed,
                moved,
                recipe: !done.existed && template.policy.recipe.is_some(),
            }
        });
        Ok(Loaded {
            templates: templates.collect(),
            blocks: front.blocks,
            skipped_blocks: skipped,
            new_bytes: Bytes::new(packed.new_bytes),
            stored_bytes: Bytes::new(packed.stored_bytes),
            repaired_blocks: known.repaired(),
            stream_bytes: Bytes::new(source.offset()),
        })
    }

    /// Takes the whole stream into the session. Gives the templates, the new packs, and how many blocks were there.
    fn receive(
        &self,
        front: &StreamFront,
        source: &mut StreamSource,
        session: &Session,
        known: &Known,
        progress: &dyn Progress,
    ) -> Result<(Vec<Received>, Packed, u64)> {
        let mut received = Vec::with_capacity(front.templates.len());
        for (number, template) in front.templates.iter().enumerate() {
            let path = session.path().join(format!("image-{number}.received"));
            received.push(receive_template(template, source, path)?);
        }
        let most = received.iter().fold(0, |sum: u64, r| sum.saturating_add(r.header.block_count()));
        if front.blocks > most {
            let announced = front.blocks;
            return Err(source.damaged(format!("it announces {announced} blocks, its images have {most}")));
        }
        let mut came = HashSet::new();
        let mut packs = PackWriter::new(session.path(), known);
        let (mut left, mut skipped) = (front.blocks, 0);
        let stop = source.stop.clone();
        let name = source.name().to_owned();
        ordered(
            &stop,
            || read_batch(source, &mut left),
            Scratch::default,
            |scratch, batch| check_batch(batch, known, scratch).map_err(|why| damaged(&name, why)),
            |(batch, there)| {
                for ((entry, range), there) in batch.blocks.into_iter().zip(there) {
                    came.insert(entry.hash);
                    // The same block may have come in a batch that was worked on at the same time.
                    if there || known.find_own(&entry.hash).is_some() {
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
        refuse_unnamed(&received, came, source)?;
        Ok((received, packs.finish()?, skipped))
    }

    /// Writes the tables of a template: its image again, and where each of its blocks lies in this store.
    fn tables(
        &self,
        folder: &StorePath,
        (template, received): (&StreamTemplate, &Received),
        front: &StreamFront,
        source: &StreamSource,
        session: &Session,
        known: &Known,
    ) -> Result<Tables> {
        let lacks = |hash: &Digest, file: &str| {
            match front.without.is_empty() {
            true => source.damaged(format!("it lacks block {hash} of file '{file}'")),
            false => Error::not_found(format!(
                "block {hash} of file '{file}' is neither in the stream nor whole in the templates that it was saved without"
            ))
            .at(self.dir())
            .remedy("stencil verify names what is damaged here; or save again without --without"),
        }
        };
        let files = received.header.files();
        let mut tables = TableWriter::new(folder, files.iter().map(|f| (f.name.clone(), f.kind)))?;
        let mut image = ImageReader::open(&received.image, files.len())?;
        for file in files {
            let mut left = file.blocks();
            let mut last = None;
            ordered(
                &source.stop,
                || source.check().and_then(|()| image.next(&mut left)),
                Scratch::default,
                |scratch, hashes: Vec<Digest>| {
                    let place = |hash: Digest| match hash == ZERO {
                        true => Ok((hash, None)),
                        false => match known.find(&hash, scratch) {
                            Some(place) => Ok((hash, Some(place))),
                            None => Err(lacks(&hash, &file.name)),
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
                let length = (file.size - (file.blocks() - 1) * BLOCK_SIZE) as usize;
                if !self.ends_in_zeros(&hash, place, length, session)? {
                    return Err(source.damaged(format!("file '{}' has bytes behind its end", file.name)));
                }
            }
            tables.end_file(file.size);
        }
        let tables = tables.finish()?;
        match tables.digest == template.digest {
            true => Ok(tables),
            false => Err(source.damaged(format!(
                "the image of template {} is not written as an image is: it would be {}",
                template.digest, tables.digest
            ))),
        }
    }

    /// True when a block, stored here or in the session, holds nothing behind its first `length` bytes: there is one
    /// spelling for one content.
    fn ends_in_zeros(&self, hash: &Digest, place: Place, length: usize, session: &Session) -> Result<bool> {
        if length as u64 == BLOCK_SIZE {
            return Ok(true);
        }
        let mut scratch = Scratch::default();
        let own = pack_path(session.path(), place.pack);
        let pack = match own.exists() {
            true => Arc::new(PackFile::open(own, place.pack)?),
            false => self.pack(place.pack)?,
        };
        scratch.verify(&pack, place.stored, hash)?;
        Ok(scratch.plain()[length..].iter().all(|b| *b == 0))
    }
}

const ZERO: Digest = Digest::new([0; 32]);

impl LoadRequest {
    /// What is to point at a template.
    fn tags(&self, template: &StreamTemplate) -> Vec<TagName> {
        if self.without_tags { Vec::new() } else { template.tags.clone() }
    }

    fn apply(&self, policy: &mut Policy) {
        policy.mode = self.mode.unwrap_or(policy.mode);
        self.owner.apply(policy);
    }
}

/// The policy of a template that is new here: what travels of it, and when it came.
fn arrived(policy: &Policy, request: &LoadRequest) -> Policy {
    let recipe = policy.recipe.clone().filter(|_| !request.without_recipes);
    Policy { created: fresh_policy().created, recipe, ..policy.clone() }
}

/// Takes policy and image of a template; the image goes to `path`.
fn receive_template(
    template: &StreamTemplate,
    source: &mut StreamSource,
    path: StorePath,
) -> Result<Received> {
    let digest = template.digest;
    let what = format!("the policy of template {digest}");
    if u64::from(template.policy_length) > MAX_LENGTH {
        return Err(source.damaged(format!("{what} has {} bytes", template.policy_length)));
    }
    let mut bytes = vec![0; template.policy_length as usize];
    source.exact(&mut bytes, &what)?;
    let policy = Policy::decode(&bytes).map_err(|e| source.invalid(e, &what))?;
    if let Some(field) = policy.unknown.keys().next() {
        // It may be what --no-recipes is to keep out.
        return Err(source.invalid(Invalid::Newer(format!("its field '{field}'")), &what));
    }
    if policy.mode & !READ_BITS != 0 || policy.uid == u32::MAX || policy.gid == u32::MAX {
        let Policy { mode, uid, gid, .. } = policy;
        return Err(source.damaged(format!("{what} gives mode {mode:o} to user {uid}, group {gid}")));
    }

    let what = format!("the image of template {digest}");
    let fail = |e| Error::io("cannot write", &path, e);
    let mut file = BufWriter::new(create(&path)?);
    let mut tree = TreeWriter::default();
    let (mut left, mut head) = (template.image_length, Vec::new());
    let mut part = vec![0; SEGMENT as usize];
    while left > 0 {
        let now = left.min(SEGMENT) as usize;
        source.exact(&mut part[..now], &what)?;
        if head.is_empty() {
            // Nothing of it is believed before its hash is known; but what no image can be need not be written.
            head = part[..now].to_vec();
            let header = ImageHeader::decode(&head).map_err(|e| source.invalid(e, &what))?;
            if header.image_length() != template.image_length {
                let (got, length) = (template.image_length, header.image_length());
                return Err(source.damaged(format!("{what} has {got} bytes, expected {length}")));
            }
        }
        tree.update(&part[..now]);
        file.write_all(&part[..now]).map_err(fail)?;
        left -= now as u64;
    }
    file.flush().map_err(fail)?;
    let (_, got) = tree.finish();
    if got != digest {
        return Err(source.damaged(format!("{what} has hash {got}")));
    }
    let header = ImageHeader::decode(&head).map_err(|e| source.invalid(e, &what))?;
    for file in header.files() {
        if file.name == MANIFEST || !file.kind.can_have(file.size) {
            let (name, kind, size) = (&file.name, file.kind.name(), file.size);
            return Err(
                source.damaged(format!("{what} has a file '{name}' of kind {kind} with {size} bytes"))
            );
        }
    }
    Ok(Received { image: path, header, policy })
}

/// The next blocks of the stream, as they came.
fn read_batch(source: &mut StreamSource, left: &mut u64) -> Result<Option<Batch>> {
    if *left == 0 {
        return Ok(None);
    }
    let mut batch = Batch { bytes: Vec::new(), blocks: Vec::new(), offset: source.offset() };
    for _ in 0..BATCH.min(usize::try_from(*left).unwrap_or(BATCH)) {
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

/// Verifies each block; says of each whether the store has it.
fn check_batch(
    batch: Batch,
    known: &Known,
    scratch: &mut Scratch,
) -> std::result::Result<(Batch, Vec<bool>), String> {
    let mut there = Vec::with_capacity(batch.blocks.len());
    for (entry, range) in &batch.blocks {
        scratch.check(&batch.bytes[range.clone()], entry.stored, &entry.hash).map_err(|why| {
            format!("block {} behind byte {} is not what was saved: {why}", entry.hash, batch.offset)
        })?;
        there.push(known.find(&entry.hash, scratch).is_some());
    }
    Ok((batch, there))
}

/// Refuses blocks that no image names: nobody would ever read them, and the sender would hear whether they are here.
fn refuse_unnamed(received: &[Received], mut came: HashSet<Digest>, source: &mut StreamSource) -> Result<()> {
    for template in received {
        let mut image = ImageReader::open(&template.image, template.header.files().len())?;
        let mut left = template.header.block_count();
        while let Some(hashes) = image.next(&mut left)? {
            source.check()?;
            for hash in hashes {
                came.remove(&hash);
            }
        }
    }
    match came.iter().next() {
        None => Ok(()),
        Some(hash) => {
            let count = came.len();
            Err(source.damaged(format!("it has {count} blocks that no image names, {hash} among them")))
        }
    }
}

/// The hashes of an image that was received.
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

    /// Some more of the `left` hashes of a file.
    fn next(&mut self, left: &mut u64) -> Result<Option<Vec<Digest>>> {
        let now = (*left).min(HASHES as u64);
        *left -= now;
        let mut bytes = vec![0; (now * HASH_LEN) as usize];
        self.file.read_exact(&mut bytes).map_err(|e| Error::io("cannot read", &self.path, e))?;
        let hashes: Vec<Digest> = bytes.as_chunks::<32>().0.iter().map(|hash| Digest::new(*hash)).collect();
        Ok((!hashes.is_empty()).then_some(hashes))
    }
}
