//! Read-only mappings of files that are written once and never changed in place.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::{Mmap, MmapOptions};

/// A part of a file in memory, read-only.
///
/// The file must be of the write-once kind: published by rename, afterwards only ever unlinked or
/// replaced as a whole. A reader checks each part by its checksum before it uses it.
#[derive(Debug)]
pub struct MappedFile(Option<Mmap>);

impl MappedFile {
    /// Maps the first `length` bytes of a write-once file.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter (its tail could not be read without a SIGBUS), or
    /// whatever mmap(2) gives.
    pub fn map(file: &File, length: u64) -> io::Result<MappedFile> {
        if file.metadata()?.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if length == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the mapping is private to this value, read-only and unmapped on drop, so no
        // reference outlives it. The bytes behind it do not change: the store writes such files under
        // a temporary name and never again after the rename (module documentation). The length was
        // compared with the file's, so no page of the mapping lies behind its end.
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
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        assert_eq!(&*MappedFile::map(&file, 5).unwrap(), b"hello");
        assert_eq!(&*MappedFile::map(&file, 0).unwrap(), b"");
        assert_eq!(MappedFile::map(&file, 6).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
