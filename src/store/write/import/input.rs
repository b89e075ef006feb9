//! An open source of an import.

use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use super::magic::{HEAD, TAIL};
use super::request::{ImportFile, Later, Source};
use crate::error::{Error, Result};
use crate::store::FileKind;
use crate::store::format::image::MAX_BYTES;
use crate::sys::files::stream;
use crate::units::{PAGE_SIZE, to_usize};

/// An open source.
#[derive(Debug)]
pub(super) struct Input {
    pub name: String,
    pub kind: FileKind,
    /// True if a source in a known format that is not plain RAM must be rejected, even from a pipe.
    pub must_be_plain: bool,
    /// True if a hole stands for pages of the base, and not for zeros.
    pub is_diff: bool,
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
            Source::Opened(opened) => {
                let file = opened.file.try_clone().map_err(|e| Error::io("cannot read", &opened.path, e))?;
                (opened.path.display().to_string(), file)
            }
            Source::Later(later) => {
                return Ok(Input {
                    name: request.name.clone(),
                    kind: request.kind,
                    must_be_plain: false,
                    is_diff: false,
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
                .hint("name the files in the directory"));
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
            is_diff: false,
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
    pub fn is_late(&self) -> bool {
        matches!(self.file, From::Later(_))
    }

    /// Opens the file of a late input.
    pub fn open_late(mut self) -> Result<Input> {
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
            .hint("run the command again; the store was not changed"));
        }
        self.version = Some(version(&meta));
        self.file = From::Open(file);
        Ok(self)
    }

    /// Returns the open file. A late input is opened before it is read.
    pub fn file(&self) -> io::Result<&File> {
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
            let mut bytes = vec![0; limit.min(to_usize(size - from))];
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
                .hint(format!("check the path: the file may have at most {limit} bytes")));
        }
        let mut bytes = vec![0; to_usize(size)];
        self.file().and_then(|f| f.read_exact_at(&mut bytes, 0)).map_err(|e| self.fail(e))?;
        Ok(Some(bytes))
    }

    /// Returns the bytes in holes of a file or device, as reported by `SEEK_HOLE`.
    pub fn hole_bytes(&self) -> Result<u64> {
        let (mut data, mut at) = (0, 0);
        while let Some(range) = self.data_after(at)? {
            data += range.end - range.start;
            at = range.end;
        }
        Ok(self.size.unwrap_or_default() - data)
    }

    /// Returns the next range outside holes at or after `offset`; `None` if only a hole is left, or nothing.
    pub fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let (file, size) = (self.file().map_err(|e| self.fail(e))?, self.size.unwrap_or_default());
        if offset >= size {
            return Ok(None);
        }
        let start = match seek(file, SeekFrom::Data(offset)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            // The file system does not support `SEEK_DATA`.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..size)),
            Err(e) => return Err(self.fail(e.into())),
        };
        let end = seek(file, SeekFrom::Hole(start)).map_or(size, |hole| hole.min(size));
        Ok((start < end).then_some(start..end))
    }

    /// Returns the size in bytes that the file system allocates at least, which is the smallest size of a hole; `None`
    /// for anything but a regular file. A tmpfs with huge pages and ZFS allocate more than a page.
    pub fn hole_unit(&self) -> Result<Option<u64>> {
        if self.version.is_none() {
            return Ok(None);
        }
        let meta = self.file().and_then(File::metadata).map_err(|e| self.fail(e))?;
        Ok(Some(meta.blksize()))
    }

    /// Returns a usage error if the size of guest memory is zero or not a multiple of the page size.
    pub fn check_size(&self, size: u64) -> Result<()> {
        if self.kind.can_have(size) {
            return Ok(());
        }
        let name = format!("file '{}' of kind {}", self.name, self.kind.name());
        Err(match size {
            0 => Error::usage(format!("{name} is empty")).hint("check the source: guest memory cannot be empty"),
            _ => Error::usage(format!("invalid size of {name}: {size} is not a multiple of {PAGE_SIZE} bytes"))
                .hint(format!(
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
        .hint("check the size of the source, or split the files into several templates"))
    }

    /// Returns an error if a regular file was modified since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        if let Some(before) = self.version {
            let meta = self.file().and_then(File::metadata).map_err(|e| self.fail(e))?;
            if version(&meta) != before {
                return Err(self.changed(if meta.len() == before.0 {
                    "was modified"
                } else {
                    "changed size"
                }));
            }
        }
        Ok(())
    }

    pub fn changed(&self, how: &str) -> Error {
        Error::failed(format!("the source {how} while being read")).at(Path::new(&self.origin)).hint(
            "stop writing to the source (pause the guest), then import the source again; nothing of this \
             template was stored",
        )
    }

    pub fn fail(&self, error: io::Error) -> Error {
        Error::io("cannot read", &self.origin, error)
    }
}

fn version(meta: &std::fs::Metadata) -> (u64, i64, i64) {
    (meta.len(), meta.mtime(), meta.mtime_nsec())
}
