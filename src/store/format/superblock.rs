//! The superblock `STORE/format`: marks a directory as a store, and holds the store's secret.

use super::fields::{Fields, Invalid, Preamble, seal, unseal};

const MAGIC: &[u8; 8] = b"STNCLSTR";

/// Identity of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Feature words.
    pub preamble: Preamble,
    /// Random identifier of the store.
    pub id: [u8; 16],
    /// Key of the inode number hash.
    pub secret: [u8; 32],
    /// Time of creation in seconds since 1970.
    pub created: u64,
}

impl Superblock {
    /// Encoded length in bytes.
    pub const LEN: usize = Preamble::LEN + 16 + 32 + 8 + 32 + 32;

    /// Creates the superblock of a new store.
    pub fn new(id: [u8; 16], secret: [u8; 32], created: u64) -> Superblock {
        Superblock { preamble: Preamble::plain(Self::LEN), id, secret, created }
    }

    /// Encodes the superblock.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN);
        self.preamble.encode(MAGIC, &mut out);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.secret);
        out.extend_from_slice(&self.created.to_le_bytes());
        out.extend_from_slice(&[0; 32]);
        seal(&mut out);
        out
    }

    /// Decodes a superblock.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not a superblock of this version.
    pub fn decode(bytes: &[u8]) -> Result<Superblock, Invalid> {
        // The superblock of a later version may be longer.
        let header = Preamble::header_length(MAGIC, bytes)? as usize;
        let header =
            bytes.get(..header).filter(|header| header.len() >= Preamble::LEN + 32).ok_or_else(|| {
                Invalid::damage(format!(
                    "the file has {} bytes and names a header of {header} bytes; expected {} bytes for both",
                    bytes.len(),
                    Self::LEN
                ))
            })?;
        let mut fields = Fields(unseal(header)?);
        let preamble = Preamble::decode(MAGIC, &mut fields)?;
        if bytes.len() != Self::LEN || header.len() != Self::LEN {
            return Err(Invalid::damage(format!(
                "the file has {} bytes and a header of {} bytes; expected {} bytes for both",
                bytes.len(),
                header.len(),
                Self::LEN
            )));
        }
        Ok(Superblock { preamble, id: fields.array()?, secret: fields.array()?, created: fields.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_a_superblock_and_detects_every_flipped_bit() {
        let block = Superblock::new([1; 16], [2; 32], 3);
        let bytes = block.encode();
        assert_eq!(bytes.len(), Superblock::LEN);
        assert_eq!(Superblock::decode(&bytes).unwrap(), block);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Superblock::decode(&bytes[..length]).is_err(), "length {length}");
        }
    }
}
