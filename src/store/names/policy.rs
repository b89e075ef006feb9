//! The changeable properties of a template: mode, owner, labels, recipe and working sets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::Digest;
use crate::store::disk::open::{Store, no_template};
use crate::store::disk::path::StorePath;
use crate::store::disk::session::replace_file;
use crate::store::format::Invalid;
use crate::units::Bytes;

/// Default mode of a template's files: readable for all users, not writable.
pub const DEFAULT_MODE: u32 = 0o444;

const HEAD: &str = "stencil policy 1 blake3:";
/// Maximum length of a policy in bytes.
pub(in crate::store) const MAX_LENGTH: u64 = 1 << 20;

/// The changeable part of a template. The digest does not depend on the policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Permission bits of the files in a mount, without write bits.
    pub mode: u32,
    /// Owner of the files in a mount.
    pub uid: u32,
    /// Group of the files in a mount.
    pub gid: u32,
    /// Labels, chosen by the user.
    pub labels: BTreeMap<String, String>,
    /// Time at which the template was added to this store, in seconds since 1970.
    pub created: u64,
    /// Recipe for launching clones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<serde_json::Value>,
    /// Working sets, by name. A set is decoded when it is used; the sets of a later version are preserved.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub working_sets: BTreeMap<String, serde_json::Value>,
    /// Fields of a later version, preserved when the policy is rewritten.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

impl Policy {
    /// Encodes the policy. The first line has the hash of the rest, so that a damaged file grants no access.
    pub(in crate::store) fn encode(&self) -> Result<Vec<u8>> {
        let body = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::failed(format!("cannot encode policy: {e}")))?;
        let mut out = format!("{HEAD}{}\n", Digest::of(&body)).into_bytes();
        out.extend_from_slice(&body);
        if out.len() as u64 > MAX_LENGTH {
            return Err(Error::usage(format!(
                "labels, recipe and working sets are too large: {} bytes",
                out.len()
            ))
            .hint("remove labels or working sets: the limit of a policy is 1 MiB"));
        }
        Ok(out)
    }

    pub(in crate::store) fn decode(bytes: &[u8]) -> std::result::Result<Policy, Invalid> {
        let line = bytes
            .iter()
            .position(|&b| b == b'\n')
            .ok_or_else(|| Invalid::damage("the first line is missing"))?;
        let (head, body) = (&bytes[..line], &bytes[line + 1..]);
        let expected = std::str::from_utf8(head)
            .ok()
            .and_then(|h| h.strip_prefix(HEAD))
            .and_then(|h| h.parse::<Digest>().ok())
            .ok_or_else(|| Invalid::damage(format!("the first line does not start with '{HEAD}'")))?;
        let got = Digest::of(body);
        if got != expected {
            return Err(Invalid::damage(format!("content has hash {got}, expected {expected}")));
        }
        serde_json::from_slice(body).map_err(|e| Invalid::Newer(format!("unsupported content: {e}")))
    }

    pub(in crate::store) fn read(path: &StorePath) -> Result<Policy> {
        let bytes = path.read(Bytes::new(MAX_LENGTH)).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Invalid::damage("the file is missing").in_file("policy", path),
            _ => path.error("cannot read policy", e),
        })?;
        Policy::decode(&bytes).map_err(|e| e.in_file("policy", path))
    }

    pub(in crate::store) fn write(&self, tmp: &StorePath, path: &StorePath) -> Result<()> {
        replace_file(tmp, path, &self.encode()?)
    }
}

impl Store {
    /// Changes the policy of a template. Concurrent changes are serialized by the names lock.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if the template does not exist, or an error if its policy cannot
    /// be written.
    pub fn set_policy(&self, digest: &Digest, change: impl FnOnce(&mut Policy)) -> Result<()> {
        let _names = self.lock_names()?;
        self.set_policy_locked(digest, change)
    }

    /// Same as [`Store::set_policy`]; the caller holds the names lock.
    pub(in crate::store) fn set_policy_locked(
        &self,
        digest: &Digest,
        change: impl FnOnce(&mut Policy),
    ) -> Result<()> {
        if !self.has(digest) {
            return Err(no_template(self.dir(), digest));
        }
        let path = self.policy_path(digest);
        let mut policy = Policy::read(&path)?;
        change(&mut policy);
        policy.write(&self.tmp_dir(), &path)
    }
}

#[cfg(test)]
mod tests {
    use crate::store::names::policy::*;

    #[test]
    fn round_trips_a_policy_and_detects_every_changed_byte() {
        let policy = Policy {
            mode: 0o440,
            uid: 1,
            gid: 2,
            labels: BTreeMap::from([("a".into(), "b".into())]),
            created: 7,
            recipe: Some(serde_json::json!({"argv": ["qemu"]})),
            working_sets: BTreeMap::from([("boot".into(), serde_json::json!({"later": 1}))]),
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
