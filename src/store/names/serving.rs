//! Inode numbers of a template's files. Processes that use a template are found by these numbers.

use serde::{Deserialize, Serialize};

use crate::store::Digest;

/// How a file is served through the mount. The value is part of the inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serving {
    /// FUSE passthrough to a hydrated backing file.
    Passthrough,
    /// Decoding of stored blocks in the server.
    Decode,
}

impl Serving {
    /// All values, in order of preference.
    pub const ALL: [Serving; 2] = [Serving::Passthrough, Serving::Decode];

    /// Returns the name used in JSON and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Serving::Passthrough => "passthrough",
            Serving::Decode => "decode",
        }
    }
}

/// Returns the inode number of a template's file: 63 bits of a keyed BLAKE3 hash, never 0 or 1. The number is the same
/// in all mounts of the store with this secret.
///
/// The secret prevents a user who knows the content from guessing the number.
pub fn inode_number(secret: &[u8; 32], digest: &Digest, file: &str, serving: Serving) -> u64 {
    for attempt in 0u8.. {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(digest.bytes());
        hasher.update(&[serving as u8, attempt]);
        hasher.update(file.as_bytes());
        let mut number = [0; 8];
        number.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        let number = u64::from_le_bytes(number) & (u64::MAX >> 1);
        if number > 1 {
            return number;
        }
    }
    2
}

/// Returns the inode number of a directory or symbolic link in mounts of the store with this secret, from its path
/// below the mount.
pub fn path_inode_number(secret: &[u8; 32], path: &str) -> u64 {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(b"name\0");
    hasher.update(path.as_bytes());
    let mut number = [0; 8];
    number.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    (u64::from_le_bytes(number) >> 1).max(2)
}

/// Inode number of the root of a mount; fixed by FUSE (`FUSE_ROOT_ID`).
pub const ROOT_INODE: u64 = 1;

#[cfg(test)]
mod tests {
    use crate::store::names::serving::*;

    #[test]
    fn inode_numbers_depend_on_all_four_inputs() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let base = inode_number(&[7; 32], &a, "memory", Serving::Decode);
        assert_eq!(base, inode_number(&[7; 32], &a, "memory", Serving::Decode));
        let others = [
            inode_number(&[8; 32], &a, "memory", Serving::Decode),
            inode_number(&[7; 32], &b, "memory", Serving::Decode),
            inode_number(&[7; 32], &a, "state", Serving::Decode),
            inode_number(&[7; 32], &a, "memory", Serving::Passthrough),
        ];
        assert!(others.iter().all(|&n| n != base && n > 1 && n >> 63 == 0));
    }
}
