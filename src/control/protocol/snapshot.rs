//! The state of a supervisor without its descriptors: read by its successor and by `stencil status`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::options::MountOptions;
use crate::store::Digest;
use crate::sys::process::ProcessId;
use crate::units::Bytes;

/// One file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileKey {
    /// The template.
    pub digest: Digest,
    /// Name of the file in the template.
    pub file: String,
}

/// Location of the backings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Unnamed files in that directory.
    Directory(PathBuf),
    /// Memory files.
    Memory,
    /// No backings, for that reason: all files are served by decode.
    Nowhere(String),
}

/// The source of the pages of a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackingKind {
    /// The backing is a decompressed copy of the file.
    Copy,
    /// The backing is a file of an EROFS mount: the kernel decompresses the packs (kernel decode).
    Kernel,
}

/// Kind, location and limit of the backings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chosen {
    /// Kind.
    pub kind: BackingKind,
    /// Location: of the copies, or of the metadata for kernel decode.
    pub cache: Cache,
    /// Why the location is not a directory.
    pub why: Option<String>,
    /// Limit of all backings, in bytes.
    pub most: Bytes,
}

/// Progress of a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// No backing, only a reason.
    None,
    /// Space is reserved; the backing is being created and filled.
    Room,
    /// The backing is immutable.
    Frozen,
}

/// State of the backing of one file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackingRow {
    /// The file.
    pub key: FileKey,
    /// Progress.
    pub stage: Stage,
    /// Backing ID on the FUSE connection, once the backing is complete, verified and registered.
    pub id: Option<u32>,
    /// Descriptor number in the supervisor; a server that was started later has the backing under the same number.
    pub descriptor: Option<i32>,
    /// `st_dev` and `st_ino` of the backing; unique while the backing is open.
    pub identity: (u64, u64),
    /// Bytes of space that are reserved for the backing.
    pub reserved: u64,
    /// Bytes of data in the backing.
    pub filled: u64,
    /// With kernel decode, when its blocks were last verified, in seconds since 1970.
    pub verified_at: Option<u64>,
    /// Why the file has no backing or, if it has one, why the backing is no longer served.
    pub why: Option<String>,
}

/// A server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerRow {
    /// Its process.
    pub process: ProcessId,
    /// Version of the server; empty until the server has reported its version.
    pub version: String,
    /// Path of the server's program when the server started.
    pub program: PathBuf,
    /// The parts of the server's sandbox that this kernel does not support, as text.
    pub lacks: Vec<String>,
    /// True when the server serves the kernel.
    pub serving: bool,
}

/// End of a server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerEnd {
    /// PID.
    pub pid: u32,
    /// Time, in seconds since 1970.
    pub at: u64,
    /// Exit status or signal, as text; `replaced` for a server that was abandoned before it exited.
    pub how: String,
    /// True if the OOM killer was active meanwhile in the server's control group (or on the host, if the group's
    /// counter cannot be read).
    pub out_of_memory: bool,
    /// Lifetime, in seconds.
    pub lived_seconds: f64,
}

/// A condemned template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CondemnedRow {
    /// The template.
    pub digest: Digest,
    /// True if the template is removed and only its backings are left.
    pub removed: bool,
}

/// Durations of requests, from their arrival in a server until the reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Upper bounds of the buckets, in seconds.
    pub bounds_seconds: Vec<f64>,
    /// Number of requests in each bucket; one bucket more than bounds, for longer durations.
    pub counts: Vec<u64>,
    /// Sum of all durations, in seconds.
    pub sum_seconds: f64,
}

/// The state of a supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    /// Version of the protocol between the processes of the mount.
    pub control_version: u32,
    /// Version of the supervisor.
    pub version: String,
    /// Options of the mount, with canonical paths.
    pub options: MountOptions,
    /// `st_dev` of the mount's files.
    pub device: u64,
    /// Directory of the mount's record.
    pub record: PathBuf,
    /// The supervisor's process.
    pub supervisor: ProcessId,
    /// The kernel's complete INIT request.
    pub init: Vec<u8>,
    /// The reply to INIT that was sent; every later server must compute the same.
    pub reply: Option<Vec<u8>>,
    /// Location and limit of the backings.
    pub chosen: Chosen,
    /// The current server.
    pub server: Option<ServerRow>,
    /// Servers that were ended and have not exited yet: their pending requests are served again after their exit.
    pub leaving: Vec<ProcessId>,
    /// `st_dev` and `st_ino` of the page with the counters.
    pub page: (u64, u64),
    /// True if a termination signal has requested the end of the mount.
    pub draining: bool,
    /// Number of servers that were started to replace another server.
    pub restarts: u64,
    /// End of the most recent server that has ended.
    pub last_end: Option<ServerEnd>,
    /// Number of consecutive servers that ended soon after their start.
    pub early_ends: u32,
    /// Time of the next start of a server, in seconds since 1970, while the start is delayed.
    pub next_start: Option<f64>,
    /// Backings, and the reasons of files that have none.
    pub backings: Vec<BackingRow>,
    /// Identity of the store.
    pub store_id: String,
    /// Condemned templates.
    pub condemned: Vec<CondemnedRow>,
    /// Counters since the start of the mount, by name.
    pub counters: BTreeMap<String, u64>,
    /// Durations of READs and OPENs since the start of the mount, by operation.
    #[serde(default)]
    pub latencies: BTreeMap<String, Latency>,
}
