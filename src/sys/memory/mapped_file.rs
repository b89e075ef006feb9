//! Read-only mappings of write-once files.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::{Mmap, MmapOptions};

/// A read-only mapping of the start of a file.
///
/// The file must be write-once: published by rename, and afterwards only unlinked or replaced as a whole. Readers
/// verify the checksum of each part before use.
#[derive(Debug)]
pub struct MappedFile(Option<Mmap>);

impl MappedFile {
    /// Maps the first `length` bytes of a write-once file.
    ///
    /// # Errors
    /// Returns `UnexpectedEof` if the file is shorter, because access beyond its end would raise SIGBUS, and an error
    /// if mmap(2) fails.
    pub fn map(file: &File, length: u64) -> io::Result<MappedFile> {
        if file.metadata()?.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if length == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the mapping is private to this value, read-only and unmapped on drop, so no reference outlives it.
        // The mapped bytes do not change: the store writes such files under a temporary name and never after the rename
        // (module documentation). The file was checked to be long enough, so no page of the mapping is beyond its end.
        let map = unsafe { MmapOptions::new().len(length).map(file)? };
        Ok(MappedFile(Some(map)))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::memory::mapped_file::*;
    use std::io::Write;

    #[test]
    fn rejects_a_file_that_is_too_short() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        assert_eq!(&*MappedFile::map(&file, 5).unwrap(), b"hello");
        assert_eq!(&*MappedFile::map(&file, 0).unwrap(), b"");
        assert_eq!(MappedFile::map(&file, 6).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
