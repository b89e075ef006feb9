//! Hash trees over tables that are mapped and not read as a whole.
//!
//! BLAKE3 is a tree: the chaining values of its 64 KiB subtrees merge to the hash of the whole input. Therefore the
//! digest of an image authenticates each segment of its block table, and a segment is hashed only at its first access.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use blake3::hazmat::{self, HasherExt, Mode};

use crate::error::{Error, Result};
use crate::store::Digest;
use crate::store::format::Invalid;
use crate::sys::memory::mapped_file::MappedFile;
use crate::units::to_usize;

/// Size of a segment in bytes: a whole BLAKE3 subtree.
pub const SEGMENT: u64 = 64 << 10;

/// A chaining value, or the root hash of an input with only one segment.
pub type ChainingValue = [u8; 32];

/// Returns the number of segments of `length` bytes; an empty input has one segment.
pub fn segments(length: u64) -> u64 {
    length.div_ceil(SEGMENT).max(1)
}

/// Returns the chaining value of segment `index` of an input with `segments` segments.
pub fn segment_value(bytes: &[u8], index: u64, segments: u64) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    if segments == 1 {
        return *hasher.update(bytes).finalize().as_bytes();
    }
    hasher.set_input_offset(index * SEGMENT).update(bytes).finalize_non_root()
}

/// Returns the hash of an input of `length` bytes with these chaining values, or `None` if their number is wrong.
pub fn root(values: &[ChainingValue], length: u64) -> Option<Digest> {
    if values.len() as u64 != segments(length) {
        return None;
    }
    if let [only] = values {
        return Some(Digest::new(*only));
    }
    let (left, right) = split(values, length);
    Some(hazmat::merge_subtrees_root(&left, &right, Mode::Hash).into())
}

fn split(values: &[ChainingValue], length: u64) -> (ChainingValue, ChainingValue) {
    let left = hazmat::left_subtree_len(length);
    let (a, b) = values.split_at((left / SEGMENT) as usize);
    (subtree(a, left), subtree(b, length - left))
}

fn subtree(values: &[ChainingValue], length: u64) -> ChainingValue {
    if let [only] = values {
        return *only;
    }
    let (left, right) = split(values, length);
    hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// Hashes a table while it is written.
#[derive(Debug, Default)]
pub struct TreeWriter {
    values: Vec<ChainingValue>,
    pending: Vec<u8>,
    length: u64,
}

impl TreeWriter {
    /// Appends the next bytes of the table.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while !bytes.is_empty() {
            // A full segment is hashed only when more bytes follow, because a single segment is hashed as the root.
            if self.pending.len() == to_usize(SEGMENT) {
                self.flush();
            }
            let free = to_usize(SEGMENT) - self.pending.len();
            let (head, tail) = bytes.split_at(free.min(bytes.len()));
            self.pending.extend_from_slice(head);
            bytes = tail;
        }
    }

    fn flush(&mut self) {
        // A segment count of 2 stands for "more than one".
        self.values.push(segment_value(&self.pending, self.values.len() as u64, 2));
        self.pending.clear();
    }

    /// Returns the chaining values and the hash of all bytes.
    pub fn finish(mut self) -> (Vec<ChainingValue>, Digest) {
        if self.values.is_empty() {
            let only = segment_value(&self.pending, 0, 1);
            return (vec![only], Digest::new(only));
        }
        self.flush();
        let (left, right) = split(&self.values, self.length);
        (self.values, hazmat::merge_subtrees_root(&left, &right, Mode::Hash).into())
    }
}

/// A mapped part of a write-once file. Each segment is verified against its chaining value before its first byte is
/// returned.
#[derive(Debug)]
pub struct CheckedTable {
    path: PathBuf,
    what: &'static str,
    file: File,
    map: MappedFile,
    base: u64,
    length: u64,
    values: Vec<ChainingValue>,
    checked: Box<[AtomicU64]>,
}

impl CheckedTable {
    /// Maps the table of `length` bytes at offset `base` of `file`. `what` names the file in error messages.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if `values` do not merge to `expected` or the file is too short.
    pub fn new(
        what: &'static str,
        path: &Path,
        file: File,
        (base, length): (u64, u64),
        values: Vec<ChainingValue>,
        expected: &Digest,
    ) -> Result<CheckedTable> {
        let damage = |why: String| Invalid::Damage(why).in_file(what, path);
        match root(&values, length) {
            Some(got) if got == *expected => {}
            Some(got) => {
                return Err(damage(format!("checksums have root {got}, expected {expected}")));
            }
            None => {
                return Err(damage(format!(
                    "wrong number of checksums for {length} bytes: {}",
                    values.len()
                )));
            }
        }
        let end = base.checked_add(length).ok_or_else(|| damage("impossible length".into()))?;
        let map = MappedFile::map(&file, end).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => damage(format!("truncated: expected at least {end} bytes")),
            _ => Error::io(format!("cannot map {what}"), path, e),
        })?;
        let words = to_usize(segments(length).div_ceil(64));
        let checked = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(CheckedTable { path: path.to_owned(), what, file, map, base, length, values, checked })
    }

    /// Returns true if both tables are parts of one file, or if fstat(2) fails.
    pub fn is_same_file(&self, other: &CheckedTable) -> bool {
        match (self.file.metadata(), other.file.metadata()) {
            (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
            _ => true,
        }
    }

    /// Returns `N` bytes at `offset`, which must not cross a segment boundary.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if the segment does not match its chaining value, or if `offset` is
    /// outside the table.
    pub fn entry<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let inside = offset.checked_add(N as u64).is_some_and(|end| end <= self.length)
            && offset / SEGMENT == (offset + N as u64 - 1) / SEGMENT;
        if !inside {
            let why = format!("offset {offset} is outside the table of {} bytes", self.length);
            return Err(Invalid::Damage(why).in_file(self.what, &self.path));
        }
        self.check(offset / SEGMENT)?;
        let at = to_usize(self.base + offset);
        let mut entry = [0; N];
        entry.copy_from_slice(&self.map[at..at + N]);
        Ok(entry)
    }

    /// Verifies every segment, accessed or not.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) for the first damaged segment.
    pub fn check_all(&self) -> Result<()> {
        (0..segments(self.length)).try_for_each(|segment| self.read_and_check(segment))
    }

    /// Passes all bytes of the table to `each` in order, each segment after its verification.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) for the first damaged segment, or the error of `each`.
    pub fn read_all(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        (0..segments(self.length)).try_for_each(|segment| each(&self.read_checked(segment)?))
    }

    fn check(&self, segment: u64) -> Result<()> {
        let (word, bit) = (&self.checked[(segment / 64) as usize], 1 << (segment % 64));
        if word.load(Ordering::Acquire) & bit == 0 {
            self.read_and_check(segment)?;
            word.fetch_or(bit, Ordering::Release);
        }
        Ok(())
    }

    /// Reads with read(2), not through the mapping: a bad sector, or a file that was truncated after open, is an error
    /// here and would be a SIGBUS there.
    fn read_and_check(&self, segment: u64) -> Result<()> {
        self.read_checked(segment).map(drop)
    }

    fn read_checked(&self, segment: u64) -> Result<Vec<u8>> {
        let start = segment * SEGMENT;
        let mut bytes = vec![0; (self.length - start).min(SEGMENT) as usize];
        let damage = |why: String| {
            let end = (start + SEGMENT).min(self.length);
            let range = format!("bytes {} to {}", self.base + start, self.base + end);
            Invalid::Damage(format!("{range}: {why}")).in_file(self.what, &self.path)
        };
        self.file
            .read_exact_at(&mut bytes, self.base + start)
            .map_err(|e| damage(format!("cannot read the file: {}", crate::error::errno_text(&e))))?;
        let got = segment_value(&bytes, segment, segments(self.length));
        let expected = self.values[to_usize(segment)];
        match got == expected {
            true => Ok(bytes),
            false => Err(damage(format!(
                "found checksum {}, expected {}",
                Digest::new(got),
                Digest::new(expected)
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::store::read::tree::*;
    use std::io::Write;

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn root_equals_the_plain_hash() {
        for length in [0, 1, 65535, 65536, 65537, 131072, 200_000, 5 * 65536, 1_000_003] {
            let bytes = bytes(length);
            let mut writer = TreeWriter::default();
            for part in bytes.chunks(10_007) {
                writer.update(part);
            }
            let (values, root_hash) = writer.finish();
            assert_eq!(root_hash, Digest::of(&bytes), "{length}");
            assert_eq!(root(&values, length as u64), Some(root_hash), "{length}");
            assert_eq!(values.len() as u64, segments(length as u64));
        }
    }

    #[test]
    fn detects_a_flipped_byte_in_its_segment_only() {
        let mut data = bytes(200_000);
        let mut writer = TreeWriter::default();
        writer.update(&data);
        let (values, digest) = writer.finish();
        data[70_000] ^= 1;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"head").unwrap();
        file.write_all(&data).unwrap();
        let open = |values, digest| {
            CheckedTable::new("table", file.path(), file.reopen().unwrap(), (4, 200_000), values, digest)
        };
        let table = open(values.clone(), &digest).unwrap();
        assert_eq!(table.entry::<4>(65532).unwrap(), data[65532..65536]);
        assert!(table.entry::<4>(65536).is_err());
        assert_eq!(table.entry::<4>(131072).unwrap(), data[131072..131076]);
        assert!(table.entry::<4>(199_998).is_err());
        assert!(table.entry::<4>(u64::MAX - 1).is_err());
        assert!(table.check_all().is_err());
        assert!(open(values[1..].to_vec(), &digest).is_err());
        assert!(open(values, &Digest::of(b"other")).is_err());
    }
}
