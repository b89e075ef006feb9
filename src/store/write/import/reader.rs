//! Reads the sources in batches and skips holes.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::mpsc::Receiver;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use super::format::plain;
use super::magic::{HEAD, TAIL};
use super::worker::Batch;
use crate::error::{Error, Result};
use crate::store::format::image::MAX_BYTES;
use crate::store::write::import::{BATCH_BYTES, ImportFile, Later, Source, Stop, Work};
use crate::store::write::stall;
use crate::store::{BLOCK_SIZE, FileKind};
use crate::sys::files::stream;
use crate::units::PAGE_SIZE;

/// An open source.
#[derive(Debug)]
pub(super) struct Input {
    pub name: String,
    pub kind: FileKind,
    /// Reject a source in a known format that is not plain RAM, even from a pipe.
    pub must_be_plain: bool,
    /// Path or file name for error messages.
    origin: String,
    file: From,
    /// Size in bytes of a file or device; `None` for a pipe.
    size: Option<u64>,
    /// Size and modification time of a regular file when it was opened.
    version: Option<(u64, i64, i64)>,
}

/// Source of an input's bytes.
#[derive(Debug)]
enum From {
    Open(File),
    Later(Later),
}

impl Input {
    pub fn open(request: &ImportFile) -> Result<Input> {
        let (origin, file) = match &request.source {
            Source::Stdin => {
                let stdin =
                    rustix::io::dup(io::stdin()).map_err(|e| Error::io("cannot read", "-", e.into()))?;
                ("-".to_owned(), File::from(stdin))
            }
            Source::Path(path) => {
                let file = stream::open_source(path).map_err(|e| Error::io("cannot open", path, e))?;
                (path.display().to_string(), file)
            }
            Source::Later(later) => {
                return Ok(Input {
                    name: request.name.clone(),
                    kind: request.kind,
                    must_be_plain: false,
                    origin: request.name.clone(),
                    size: Some(later.size),
                    file: From::Later(later.clone()),
                    version: None,
                });
            }
        };
        let fail = |e| Error::io("cannot read", &origin, e);
        let meta = file.metadata().map_err(fail)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            return Err(Error::usage("cannot import a directory")
                .at(&origin)
                .remedy("give the paths of the files in the directory"));
        }
        let size = if kind.is_file() {
            Some(meta.len())
        } else if kind.is_block_device() {
            Some((&file).seek(io::SeekFrom::End(0)).map_err(fail)?)
        } else {
            None
        };
        // A file on standard input is read from its current offset, like a stream.
        let size = if request.source == Source::Stdin { None } else { size };
        let version = (kind.is_file() && size.is_some()).then(|| version(&meta));
        let input = Input {
            name: request.name.clone(),
            kind: request.kind,
            must_be_plain: false,
            origin: origin.clone(),
            file: From::Open(file),
            size,
            version,
        };
        if let (Some(_), From::Open(file)) = (size, &input.file) {
            let _ = fadvise(file, 0, None, Advice::Sequential);
        }
        Ok(input)
    }

    /// Returns true if the input is opened after all others have been read.
    fn is_late(&self) -> bool {
        matches!(self.file, From::Later(_))
    }

    /// Opens the file of a late input.
    fn open_late(mut self) -> Result<Input> {
        let From::Later(later) = &self.file else { return Ok(self) };
        let file = (later.open)()?;
        let meta = file.metadata().map_err(|e| self.fail(e))?;
        if !meta.is_file() || meta.len() != later.size {
            return Err(Error::failed(format!(
                "size of the source is {}, expected {} bytes",
                meta.len(),
                later.size
            ))
            .at(&self.origin)
            .remedy("run the command again; the store was not changed"));
        }
        self.version = Some(version(&meta));
        self.file = From::Open(file);
        Ok(self)
    }

    /// Returns the open file. A late input is opened before it is read.
    fn file(&self) -> io::Result<&File> {
        match &self.file {
            From::Open(file) => Ok(file),
            From::Later(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub fn size(&self) -> Option<u64> {
        self.size
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Returns the first and the last bytes of a file or device; `None` for a pipe, which can be read only once.
    pub fn ends(&self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let (Some(size), From::Open(file)) = (self.size, &self.file) else { return Ok(None) };
        let part = |from: u64, limit: usize| {
            let mut bytes = vec![0; limit.min((size - from) as usize)];
            file.read_exact_at(&mut bytes, from).map_err(|e| self.fail(e)).map(|()| bytes)
        };
        Ok(Some((part(0, HEAD)?, part(size.saturating_sub(TAIL as u64), TAIL)?)))
    }

    /// Returns all bytes of a file or device of at most `limit` bytes; `None` for a pipe.
    pub fn whole(&self, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(size) = self.size else { return Ok(None) };
        if size > limit {
            return Err(Error::usage(format!("file '{}' is too large: {size} bytes", self.name))
                .at(&self.origin)
                .remedy(format!("check the path: the file may have at most {limit} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.file().and_then(|f| f.read_exact_at(&mut bytes, 0)).map_err(|e| self.fail(e))?;
        Ok(Some(bytes))
    }

    /// Returns the bytes in holes of a file or device, as reported by `SEEK_HOLE`.
    pub fn hole_bytes(&self) -> Result<u64> {
        let size = self.size.unwrap_or_default();
        let file = self.file().map_err(|e| self.fail(e))?;
        let (mut holes, mut at) = (0, 0);
        while at < size {
            let hole = match seek(file, SeekFrom::Hole(at)) {
                Ok(hole) => hole.min(size),
                // The file system does not support `SEEK_HOLE`.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => break,
                Err(e) => return Err(self.fail(e.into())),
            };
            at = match seek(file, SeekFrom::Data(hole)) {
                Ok(data) => data.min(size),
                Err(Errno::NXIO) => size,
                Err(e) => return Err(self.fail(e.into())),
            };
            holes += at - hole;
        }
        Ok(holes)
    }

    /// Returns a usage error if the size of guest memory is zero or not a multiple of the page size.
    pub fn check_size(&self, size: u64) -> Result<()> {
        if self.kind.can_have(size) {
            return Ok(());
        }
        let name = format!("file '{}' of kind {}", self.name, self.kind.name());
        Err(match size {
            0 => Error::usage(format!("{name} is empty")).remedy("check the source: guest memory cannot be empty"),
            _ => Error::usage(format!("invalid size of {name}: {size} is not a multiple of {PAGE_SIZE} bytes"))
                .remedy(format!(
                    "check that the source is complete; 'truncate -s {} FILE' pads the file with zeros; data other than \
                     guest memory can be imported with the kind 'blob'",
                    size.next_multiple_of(PAGE_SIZE)
                )),
        }
        .at(&self.origin))
    }

    /// Returns a usage error if a template with `total` bytes up to and including this file would be too large.
    pub fn check_total(&self, total: u64) -> Result<()> {
        if total <= MAX_BYTES {
            return Ok(());
        }
        Err(Error::usage(format!(
            "template too large: at least {total} bytes up to file '{}', the limit is {MAX_BYTES}",
            self.name
        ))
        .at(&self.origin)
        .remedy("check the size of the source, or split the files into several templates"))
    }

    fn changed(&self, how: &str) -> Error {
        Error::failed(format!("the source {how} while being read")).at(Path::new(&self.origin)).remedy(
            "stop writing to the source (pause the guest), then import it again; the store was not changed",
        )
    }

    fn fail(&self, error: io::Error) -> Error {
        Error::io("cannot read", &self.origin, error)
    }
}

fn version(meta: &std::fs::Metadata) -> (u64, i64, i64) {
    (meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// Returns the order in which inputs are read: late inputs come last.
pub(super) fn order(inputs: &[Input]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..inputs.len()).collect();
    order.sort_by_key(|&at| inputs.get(at).is_some_and(Input::is_late));
    order
}

/// Reads all inputs in this order. `empty` supplies batches to fill; `send` takes the batches.
pub(super) fn run(
    inputs: Vec<Input>,
    order: &[usize],
    stop: &Stop<'_>,
    empty: &Receiver<Batch>,
    mut send: impl FnMut(Work) -> Result<()>,
) -> Result<()> {
    let mut inputs: Vec<Option<Input>> = inputs.into_iter().map(Some).collect();
    for &at in order {
        let Some(input) = inputs.get_mut(at).and_then(Option::take) else { continue };
        stop.check()?;
        let input = input.open_late()?;
        let size = match input.size {
            Some(size) => read_file(&input, size, stop, empty, &mut send).map(|()| size)?,
            None => read_stream(&input, stop, empty, &mut send)?,
        };
        send(Work::End(size))?;
    }
    Ok(())
}

fn next_batch(stop: &Stop<'_>, empty: &Receiver<Batch>) -> Result<Batch> {
    stop.check()?;
    let mut batch = empty.recv().map_err(|_| Error::failed("import stopped"))?;
    batch.plain.resize(BATCH_BYTES, 0);
    Ok(batch)
}

fn read_file(
    input: &Input,
    size: u64,
    stop: &Stop<'_>,
    empty: &Receiver<Batch>,
    send: &mut impl FnMut(Work) -> Result<()>,
) -> Result<()> {
    let mut offset = 0;
    while offset < size {
        let (start, end) = next_data(input, offset, size)?;
        if start > offset {
            send(Work::Zeros((start - offset).div_ceil(BLOCK_SIZE)))?;
        }
        offset = start;
        while offset < end {
            let mut batch = next_batch(stop, empty)?;
            let length = (end - offset).min(BATCH_BYTES as u64) as usize;
            batch.length = length;
            let read = input.file().and_then(|f| f.read_exact_at(&mut batch.plain[..length], offset));
            read.map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => input.changed("was truncated"),
                _ => input.fail(e),
            })?;
            offset += length as u64;
            send(Work::Data(batch))?;
        }
    }
    if let Some(before) = input.version {
        let meta = input.file().and_then(File::metadata).map_err(|e| input.fail(e))?;
        if version(&meta) != before {
            return Err(input.changed(if meta.len() == before.0 { "was modified" } else { "changed size" }));
        }
    }
    Ok(())
}

/// Returns the next range outside holes, widened to whole blocks; `(size, size)` if only a hole is left.
fn next_data(input: &Input, offset: u64, size: u64) -> Result<(u64, u64)> {
    let file = input.file().map_err(|e| input.fail(e))?;
    let data = match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data.min(size),
        Err(Errno::NXIO) => size,
        // The file system does not support `SEEK_DATA`.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((offset, size)),
        Err(e) => return Err(input.fail(e.into())),
    };
    if data == size {
        return Ok((size, size));
    }
    let hole = match seek(file, SeekFrom::Hole(data)) {
        Ok(hole) => hole.min(size),
        Err(_) => size,
    };
    let start = data / BLOCK_SIZE * BLOCK_SIZE;
    Ok((start.max(offset), hole.next_multiple_of(BLOCK_SIZE).min(size)))
}

fn read_stream(
    input: &Input,
    stop: &Stop<'_>,
    empty: &Receiver<Batch>,
    send: &mut impl FnMut(Work) -> Result<()>,
) -> Result<u64> {
    let mut total = 0;
    let mut file = input.file().map_err(|e| input.fail(e))?;
    loop {
        let mut batch = next_batch(stop, empty)?;
        let mut have = 0;
        while have < BATCH_BYTES {
            wait_readable(input, stop, total + have as u64)?;
            match file.read(&mut batch.plain[have..]) {
                Ok(0) => break,
                Ok(count) => have += count,
                // The pipe is nonblocking: opened so, or set so by another process that shares the open file
                // description.
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(input.fail(e)),
            }
        }
        total += have as u64;
        input.check_total(total)?;
        if total == have as u64 && input.must_be_plain {
            plain(input, batch.plain.get(..have.min(HEAD)).unwrap_or_default(), &[])?;
        }
        if have > 0 {
            batch.length = have;
            send(Work::Data(batch))?;
        }
        if have < BATCH_BYTES {
            input.check_size(total)?;
            return Ok(total);
        }
    }
}

fn wait_readable(input: &Input, stop: &Stop<'_>, have: u64) -> Result<()> {
    let file = input.file().map_err(|e| input.fail(e))?;
    if stream::wait_readable(file, stop.stall, || stop.check(), |e| input.fail(e))? {
        return Ok(());
    }
    Err(Error::try_again(format!(
        "the source of file '{}' stalled at offset {have}: no bytes for {} s; nothing was imported",
        input.name,
        stop.stall.unwrap_or_default().as_secs_f64()
    ))
    .at(&input.origin)
    .remedy(stall::REMEDY))
}
