//! Encoding and decoding of fields, and the preamble of every header.

use std::path::Path;

use crate::error::Error;

/// Version of every structure that this build writes.
pub const VERSION: u32 = 1;

/// Why bytes cannot be decoded as a structure of the store format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invalid {
    /// The bytes differ from the written ones.
    Damage(String),
    /// The bytes were written by a newer Stencil, with a version or feature that this build does not support.
    Newer(String),
}

impl Invalid {
    /// Creates an [`Invalid::Damage`].
    pub fn damage(what: impl Into<String>) -> Invalid {
        Invalid::Damage(what.into())
    }

    /// Converts this into the error for the file that holds the bytes; `what` names the file's kind (`pack`,
    /// `placement`).
    pub fn in_file(self, what: &str, path: impl AsRef<Path>) -> Error {
        match self {
            Invalid::Damage(why) => Error::damage(format!("{what} is damaged: {why}")).at(path),
            Invalid::Newer(why) => Error::failed(format!("{what} needs a newer Stencil: {why}"))
                .at(path)
                .hint("update Stencil on this host"),
        }
    }
}

/// Decodes fields from the front of a slice.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], Invalid> {
        let (head, tail) = self.0.split_at_checked(length).ok_or_else(|| {
            Invalid::damage(format!(
                "truncated: length is {}, expected at least {length} bytes",
                self.0.len()
            ))
        })?;
        self.0 = tail;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Invalid> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<u32, Invalid> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Invalid> {
        self.array().map(u64::from_le_bytes)
    }

    /// Fails if bytes follow the last field.
    pub fn end(&self) -> Result<(), Invalid> {
        match self.0.len() {
            0 => Ok(()),
            length => Err(Invalid::damage(format!("unexpected bytes after the last field: {length}"))),
        }
    }

    /// Skips reserved bytes, which must be zero.
    pub fn reserved(&mut self, length: usize) -> Result<(), Invalid> {
        match self.bytes(length)?.iter().all(|&b| b == 0) {
            true => Ok(()),
            false => Err(Invalid::damage("a reserved field is not zero")),
        }
    }
}

/// Converts a length or count in a header.
#[expect(
    clippy::cast_possible_truncation,
    reason = "headers, and the lengths and counts in them, are smaller than 4 GiB"
)]
pub(super) const fn in_header(n: usize) -> u32 {
    n as u32
}

/// First 40 bytes of every binary file: magic, version, header length and three feature words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Length in bytes of the header that starts with this preamble.
    pub header_length: u32,
    /// Features that readers and writers may ignore.
    pub compatible: u64,
    /// Features that readers may ignore and writers must support.
    pub read_only_compatible: u64,
    /// Features that readers and writers must support.
    pub incompatible: u64,
}

impl Preamble {
    /// Encoded length in bytes.
    pub const LEN: usize = 40;

    /// Creates the preamble of a header of this length without features.
    pub fn plain(header_length: usize) -> Preamble {
        Preamble {
            header_length: in_header(header_length),
            compatible: 0,
            read_only_compatible: 0,
            incompatible: 0,
        }
    }

    pub(super) fn encode(&self, magic: &[u8; 8], out: &mut Vec<u8>) {
        out.extend_from_slice(magic);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.header_length.to_le_bytes());
        out.extend_from_slice(&self.compatible.to_le_bytes());
        out.extend_from_slice(&self.read_only_compatible.to_le_bytes());
        out.extend_from_slice(&self.incompatible.to_le_bytes());
    }

    /// Decodes a preamble of this version. The caller must verify the checksum of the header first; otherwise a damaged
    /// version field would be reported as a newer Stencil.
    pub(super) fn decode(magic: &[u8; 8], fields: &mut Fields<'_>) -> Result<Preamble, Invalid> {
        let (version, preamble) = Preamble::parse(magic, fields)?;
        preamble.accept(version)
    }

    /// Returns the length of a header of any version. In every version the last 32 bytes of the header are its
    /// checksum.
    pub(super) fn header_length(magic: &[u8; 8], bytes: &[u8]) -> Result<u32, Invalid> {
        Preamble::parse(magic, &mut Fields(bytes)).map(|(_, preamble)| preamble.header_length)
    }

    fn parse(magic: &[u8; 8], fields: &mut Fields<'_>) -> Result<(u32, Preamble), Invalid> {
        let found = fields.array::<8>()?;
        if found != *magic {
            return Err(Invalid::damage(format!(
                "magic is \"{}\", expected \"{}\"",
                found.escape_ascii(),
                magic.escape_ascii()
            )));
        }
        let (version, header_length) = (fields.u32()?, fields.u32()?);
        let preamble = Preamble {
            header_length,
            compatible: fields.u64()?,
            read_only_compatible: fields.u64()?,
            incompatible: fields.u64()?,
        };
        Ok((version, preamble))
    }

    /// Rejects versions and features that this build does not support.
    fn accept(self, version: u32) -> Result<Preamble, Invalid> {
        if version != VERSION {
            return Err(Invalid::Newer(format!("unsupported format version {version}, expected {VERSION}")));
        }
        if self.incompatible != 0 {
            return Err(Invalid::Newer(format!("unsupported features {:#x}", self.incompatible)));
        }
        Ok(self)
    }
}

/// Appends the checksum of the bytes in `out`.
pub(super) fn seal(out: &mut Vec<u8>) {
    let hash = blake3::hash(out);
    out.extend_from_slice(hash.as_bytes());
}

/// Verifies the checksum at the end of `bytes` and returns the bytes before it.
pub(super) fn unseal(bytes: &[u8]) -> Result<&[u8], Invalid> {
    let (body, sum) = bytes.split_last_chunk::<32>().ok_or_else(|| {
        Invalid::damage(format!("truncated: length is {}, expected at least 32 bytes", bytes.len()))
    })?;
    let got = blake3::hash(body);
    if got != *sum {
        let expected = blake3::Hash::from_bytes(*sum);
        return Err(Invalid::damage(format!("header has checksum {got}, expected {expected}")));
    }
    Ok(body)
}
