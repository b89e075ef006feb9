//! BLAKE3 digests, which name content.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A BLAKE3 hash of a template's image (the identity of the template) or of one plain block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// Creates a digest from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }

    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// Returns the bytes of the digest.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns `template HEX` for one digest and `N templates` for several, for use in a message.
    pub fn describe_all(digests: &[Digest]) -> String {
        match digests {
            [digest] => format!("template {digest}"),
            _ => format!("{} templates", digests.len()),
        }
    }

    /// Returns the first 12 hex digits, for tables.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Digest {
        Digest(*hash.as_bytes())
    }
}

/// 64 lowercase hex digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{self}")
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        // There is only one spelling: a digest is also a file name, and a flipped bit must not yield another spelling
        // of the same digest.
        let spelled = blake3::Hash::from_hex(text).map(Digest::from).ok().filter(|d| d.to_string() == text);
        spelled.ok_or_else(|| {
            Error::usage(format!("invalid digest '{}'", text.escape_debug()))
                .hint("write all 64 hexadecimal digits of the digest, in lower case")
        })
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Digest, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use crate::store::format::digest::*;

    #[test]
    fn round_trips_text_and_rejects_other_spellings() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(serde_json::to_string(&digest).unwrap(), format!("\"{digest}\""));
        for bad in ["", "12", &"g".repeat(64), &"a".repeat(65), &"A".repeat(64)] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
