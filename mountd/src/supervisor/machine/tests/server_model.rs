//! The model of a server, and of the files that it serves.

use std::collections::{BTreeMap, HashSet};

use stencilfs::control::FileKey;
use stencilfs::store::Digest;

use crate::protocol::ServerRequest;

/// The number of a file. Each file belongs to another template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u8);

impl Key {
    pub const ALL: [Key; 3] = [Key(0), Key(1), Key(2)];

    pub fn digest(self) -> Digest {
        Digest::of(&[self.0])
    }

    pub fn file(self) -> FileKey {
        FileKey { digest: self.digest(), file: "memory".into() }
    }

    pub fn of(file: &FileKey) -> Key {
        *Key::ALL.iter().find(|key| key.digest() == file.digest).expect("a known file")
    }
}

/// The model of a server.
#[derive(Debug, Default)]
pub struct ServerModel {
    pub is_candidate: bool,
    pub is_killed: bool,
    pub last_number: u64,
    /// The pending request.
    pub pending: Option<(u64, ServerRequest)>,
    /// The list of condemned templates that this server applies.
    pub list: HashSet<Digest>,
    /// The backings that the server answers opens with, and their ids.
    pub ready: BTreeMap<Key, u32>,
    /// The backings that the server is filling, and the identities of their files.
    pub filling: BTreeMap<Key, (u64, u64)>,
}

impl ServerModel {
    pub fn refuses(&self, key: Key) -> bool {
        self.list.contains(&key.digest())
    }

    /// Returns the next request of the server to hydrate a file.
    pub fn next_step(&self, key: Key, frozen: bool) -> ServerRequest {
        let file = key.file();
        match self.filling.get(&key) {
            None => ServerRequest::Reserve { key: file, size: 1, data_bytes: 1 },
            Some(_) if !frozen => ServerRequest::Freeze { key: file },
            Some(&identity) => ServerRequest::Register { key: file, identity, verified_at: Some(1) },
        }
    }

    pub fn withdraw(&mut self, keys: &[Key]) -> Vec<FileKey> {
        keys.iter().filter(|key| self.ready.remove(key).is_some()).map(|key| key.file()).collect()
    }
}
