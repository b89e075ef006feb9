//! What may change about a template: mode, owner, labels, its recipe.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Digest;
use super::format::Invalid;
use super::path::StorePath;
use super::publish::replace_file;
use crate::error::{Error, Result};
use crate::units::Bytes;

/// Mode of a template's files when none is given: everybody reads, nobody writes.
pub const DEFAULT_MODE: u32 = 0o444;

const HEAD: &str = "stencil policy 1 blake3:";
/// Longest policy in bytes.
pub(super) const MAX_LENGTH: u64 = 1 << 20;

/// The changeable part of a template; its digest does not depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Permission bits of its files in a mount; without write bits.
    pub mode: u32,
    /// Owner of its files in a mount.
    pub uid: u32,
    /// Group of its files in a mount.
    pub gid: u32,
    /// Free words of the user.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it came into this store, in seconds since 1970.
    pub created: u64,
    /// How to launch clones of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<serde_json::Value>,
    /// What a later version has written beside these: a change of these keeps it.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Policy {
    /// The first line carries the hash of the rest, so that a damaged file cannot grant anything.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let body = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::failed(format!("cannot write the policy: {e}")))?;
        let mut out = format!("{HEAD}{}\n", Digest::of(&body)).into_bytes();
        out.extend_from_slice(&body);
        if out.len() as u64 > MAX_LENGTH {
            return Err(Error::usage(format!("labels and recipe take {} bytes", out.len()))
                .remedy("use fewer labels: one MiB is the most a template can carry"));
        }
        Ok(out)
    }

    pub(super) fn decode(bytes: &[u8]) -> std::result::Result<Policy, Invalid> {
        let line = bytes.iter().position(|&b| b == b'\n').ok_or_else(|| Invalid::damage("no first line"))?;
        let (head, body) = (&bytes[..line], &bytes[line + 1..]);
        let expected = std::str::from_utf8(head)
            .ok()
            .and_then(|h| h.strip_prefix(HEAD))
            .and_then(|h| h.parse::<Digest>().ok())
            .ok_or_else(|| Invalid::damage(format!("its first line is not '{HEAD}…'")))?;
        let got = Digest::of(body);
        if got != expected {
            return Err(Invalid::damage(format!("its content has hash {got}, expected {expected}")));
        }
        serde_json::from_slice(body).map_err(|e| Invalid::Newer(format!("its JSON: {e}")))
    }

    pub(super) fn read(path: &StorePath) -> Result<Policy> {
        let bytes = path.read(Bytes::new(MAX_LENGTH)).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Invalid::damage("it is missing").in_file("policy", path),
            _ => path.error("cannot read the policy", e),
        })?;
        Policy::decode(&bytes).map_err(|e| e.in_file("policy", path))
    }

    pub(super) fn write(&self, tmp: &StorePath, path: &StorePath) -> Result<()> {
        replace_file(tmp, path, &self.encode()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_every_flipped_byte() {
        let policy = Policy {
            mode: 0o440,
            uid: 1,
            gid: 2,
            labels: BTreeMap::from([("a".into(), "b".into())]),
            created: 7,
            recipe: Some(serde_json::json!({"argv": ["qemu"]})),
            unknown: BTreeMap::from([("later".into(), serde_json::json!({"x": [1, null]}))]),
        };
        let bytes = policy.encode().unwrap();
        assert_eq!(Policy::decode(&bytes).unwrap(), policy);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(Policy::decode(&bad).is_err(), "byte {at}");
        }
    }
}
