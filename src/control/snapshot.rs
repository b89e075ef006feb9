//! What a supervisor knows that is no descriptor: what its successor reads, and what `stencil status` asks for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::options::MountOptions;
use crate::store::Digest;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// One file of one template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileKey {
    /// The template.
    pub digest: Digest,
    /// Name of the file in it.
    pub file: String,
}

/// Where backings are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Unnamed files in that directory.
    Directory(PathBuf),
    /// Memory files.
    Memory,
    /// Nowhere, for that reason: everything is served by decode.
    Nowhere(String),
}

/// Where backings are made, and how much room they have.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chosen {
    /// Where.
    pub cache: Cache,
    /// Why not in a directory.
    pub why: Option<String>,
    /// Most bytes.
    pub most: Bytes,
}

/// How far a backing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// There is none, only a reason why.
    None,
    /// Room is set aside; it is made and filled.
    Room,
    /// Nobody can change it any more.
    Frozen,
}

/// What is known of one file's backing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackingRow {
    /// Of which file.
    pub key: FileKey,
    /// How far it is.
    pub stage: Stage,
    /// Its id on the connection, once it is complete, verified and registered.
    pub id: Option<u32>,
    /// Number of its descriptor in the supervisor; a server that was started after it has it under the same number.
    pub descriptor: Option<i32>,
    /// `st_dev` and `st_ino` of the backing file: nobody else has these while it is open.
    pub identity: (u64, u64),
    /// Bytes of room that are set aside for it.
    pub reserved: u64,
    /// Bytes of data in it.
    pub filled: u64,
    /// Why the file has none.
    pub why: Option<String>,
}

/// The process that answers the kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerRow {
    /// Which.
    pub process: ProcessId,
    /// Its version; empty until it has said so.
    pub version: String,
    /// Its program, as it was named when it was started.
    pub program: PathBuf,
    /// The parts of its sandbox that this kernel could not do, in words.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// True once it answers the kernel. Ledgers without the word are of servers that do.
    #[serde(default = "yes")]
    pub serving: bool,
}

fn yes() -> bool {
    true
}

/// How a server ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerEnd {
    /// Its process.
    pub pid: u32,
    /// When, in seconds since 1970.
    pub at: u64,
    /// In words: the exit code or the signal; `replaced` for one that was given up before it ended.
    pub how: String,
    /// True when the OOM killer has struck in its control group (or, where that cannot be read, on the host) meanwhile.
    pub out_of_memory: bool,
    /// How long it lived.
    pub lived_seconds: f64,
}

/// A template that is about to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CondemnedRow {
    /// Which.
    pub digest: Digest,
    /// True once it is removed, and only its backings are left.
    pub removed: bool,
}

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    /// Which words its processes speak.
    pub control_version: u32,
    /// Version of the supervisor.
    pub version: String,
    /// How the mount was asked for, with canonical paths.
    pub options: MountOptions,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Folder of its record.
    pub record: PathBuf,
    /// The supervisor.
    pub supervisor: ProcessId,
    /// The kernel's INIT request, whole.
    pub init: Vec<u8>,
    /// The reply that the kernel has; every later server must give the same.
    pub reply: Option<Vec<u8>>,
    /// Where backings are.
    pub chosen: Chosen,
    /// Who serves.
    pub server: Option<ServerRow>,
    /// Servers that were ended and have not gone yet: what they had read comes again once they have.
    #[serde(default)]
    pub leaving: Vec<ProcessId>,
    /// `st_dev` and `st_ino` of the counters page.
    #[serde(default)]
    pub page: Option<(u64, u64)>,
    /// More than 0 once a signal has asked the supervisor for the end.
    #[serde(default)]
    pub terminations: u32,
    /// Servers that were started in place of one that died or was replaced.
    pub restarts: u64,
    /// How the last of them ended.
    #[serde(default)]
    pub last_end: Option<ServerEnd>,
    /// Servers in a row that have ended soon after their start.
    #[serde(default)]
    pub early_ends: u32,
    /// When the next one is started, in seconds since 1970, where it waits.
    #[serde(default)]
    pub next_start: Option<f64>,
    /// Backings, and the reasons of files that have none.
    pub backings: Vec<BackingRow>,
    /// Identity of the store; unknown to ledgers of versions before.
    #[serde(default)]
    pub store_id: Option<String>,
    /// Templates that nobody may find or open.
    #[serde(default)]
    pub condemned: Vec<CondemnedRow>,
    /// What was done since the mount began, by name.
    pub counters: BTreeMap<String, u64>,
}
