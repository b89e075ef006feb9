//! Templates of a store, for reading.
//!
//! A process that only maps a template needs a path in a mount, and no access to the store. With access to the store, a
//! process reads content without a mount, and finds the path of a template's file by its name.
//!
//! ```
//! use stencilfs::templates::Templates;
//! use stencilfs::units::FileOffset;
//!
//! # #[cfg(feature = "internals")]
//! # fn main() -> stencilfs::error::Result<()> {
//! # use stencilfs::store::{FileKind, ImportFile, ImportRequest, Source, Store};
//! # let directory = tempfile::tempdir().unwrap();
//! # let (image, dir) = (directory.path().join("image"), directory.path().join("store"));
//! # std::fs::write(&image, vec![7; 1 << 20]).unwrap();
//! # let file = ImportFile { name: "memory".into(), kind: FileKind::Ram, source: Source::Path(image) };
//! # let request = ImportRequest::new(Some("web:1".parse()?), vec![file]);
//! # Store::open_or_create(&dir)?.import(request, &stencilfs::progress::Silent)?;
//! let templates = Templates::open(dir)?;
//! let template = templates.get("web:1")?;
//! for file in template.files() {
//!     println!("{}: {} bytes, of kind {}", file.name, file.size.get(), file.kind.name());
//! }
//! let mut reader = template.reader("memory")?;
//! let mut page = [0; 4096];
//! reader.read_at(FileOffset::new(8192), &mut page)?;
//! # assert_eq!((page, template.files().len()), ([7; 4096], 1));
//! # assert_eq!(reader.data_ranges()?, [0..1 << 20]);
//! # let error = template.path_in(directory.path(), "memory").unwrap_err();
//! # assert_eq!(error.code(), stencilfs::error::Code::NotFound);
//! // template.path_in("/srv/templates", "memory")? is the path to map.
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "internals"))]
//! # fn main() {}
//! ```

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::store::{self, Scratch, Serving, Store, inode_number};
use crate::units::FileOffset;

pub use crate::store::{BLOCK_SIZE, Digest, FileKind, TemplateFile};

/// A store, opened for reading.
#[derive(Debug, Clone)]
pub struct Templates(Store);

impl Templates {
    /// Opens the store in a directory.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if there is no store, and an error if the directory is
    /// not a store or the store needs a newer version of this crate.
    pub fn open(dir: impl AsRef<Path>) -> Result<Templates> {
        Store::open(dir.as_ref()).map(Templates)
    }

    /// Returns all tags as `NAME:TAG` with their templates, sorted.
    ///
    /// # Errors
    /// Returns an error if the directory of the tags cannot be read.
    pub fn tags(&self) -> Result<Vec<(String, Digest)>> {
        let tags = self.0.tags()?;
        Ok(tags.into_iter().map(|entry| (format!("{}:{}", entry.name, entry.tag), entry.digest)).collect())
    }

    /// Opens the template with a reference: `NAME`, `NAME:TAG`, or eight or more digits of a digest.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) for an invalid or ambiguous reference,
    /// [`Code::NotFound`](crate::error::Code::NotFound) if there is no such template, and
    /// [`Code::Damage`](crate::error::Code::Damage) if its tables are damaged.
    pub fn get(&self, reference: &str) -> Result<Template> {
        let digest = self.0.resolve(&reference.parse()?)?;
        Ok(Template { template: self.0.template(&digest)?, secret: self.0.secret() })
    }
}

/// An open template.
#[derive(Debug)]
pub struct Template {
    template: store::Template,
    /// Key of the inode numbers in mounts of the store.
    secret: [u8; 32],
}

impl Template {
    /// Returns the digest, which names the content. A tag may be moved to another template.
    pub fn digest(&self) -> &Digest {
        self.template.digest()
    }

    /// Returns the files, sorted by name.
    pub fn files(&self) -> &[TemplateFile] {
        self.template.files()
    }

    /// Returns a reader of one file.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the template has no such file.
    pub fn reader(&self, file: &str) -> Result<Reader<'_>> {
        let file = self.template.find_file(file)?;
        Ok(Reader { template: &self.template, file, scratch: Scratch::default() })
    }

    /// Returns the path of one file in a mount of the store: the path that a VMM maps.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code::NotFound) if the template has no such file or the mount does not
    /// show it, and [`Code::Failed`](crate::error::Code::Failed) if another store is mounted there.
    pub fn path_in(&self, mountpoint: impl AsRef<Path>, file: &str) -> Result<PathBuf> {
        self.template.find_file(file)?;
        let path = mountpoint.as_ref().join("by-id").join(self.digest().to_string()).join(file);
        let failed = |e| Error::io("cannot find the template in the mount", &path, e);
        let metadata =
            std::fs::metadata(&path).map_err(|e| failed(e).hint("mount the store: stencil mount MNT"))?;
        let is_of_store =
            |serving: &Serving| inode_number(&self.secret, self.digest(), file, *serving) == metadata.ino();
        match Serving::ALL.iter().any(is_of_store) {
            true => Ok(path),
            false => Err(Error::failed("the file belongs to a mount of another store")
                .at(path)
                .hint("name a mountpoint of the store: run 'stencil status' to list the mounts")),
        }
    }
}

/// Reads one file of a template. Each thread uses its own reader, because a reader holds buffers.
#[derive(Debug)]
pub struct Reader<'a> {
    template: &'a store::Template,
    file: usize,
    scratch: Scratch,
}

impl Reader<'_> {
    /// Fills `out` with the bytes at `offset`. Every byte is verified before it is returned. Reads of whole blocks
    /// ([`BLOCK_SIZE`] bytes at a multiple of it) need no copy.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code::Damage) if a block is damaged, and
    /// [`Code::Usage`](crate::error::Code::Usage) if the range exceeds the file.
    pub fn read_at(&mut self, offset: FileOffset, out: &mut [u8]) -> Result<()> {
        self.template.read_range(self.file, offset, &mut self.scratch, out)
    }

    /// Returns the byte ranges of blocks that are not zero, in ascending order. The last range may exceed the file.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code::Damage) if the table of blocks is damaged.
    pub fn data_ranges(&self) -> Result<Vec<Range<u64>>> {
        self.template.data_byte_ranges(self.file)
    }
}
