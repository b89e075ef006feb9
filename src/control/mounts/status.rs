//! Status of a mount: the state of its supervisor, and the templates of its store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::registry::{LOG_FILE, Mount};
use crate::control::protocol::options::ServeMode;
use crate::control::protocol::snapshot::{BackingKind, Cache, FileKey, Latency, ServerEnd, Snapshot};
use crate::error::{Error, Result};
use crate::sanitize;
use crate::store::{Digest, FileKind, Serving, Store};
use crate::sys::files::read_ahead;
use crate::units::Bytes;

/// Status of a mount, as printed by `status --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountStatus {
    /// Mountpoint; after a lazy unmount, the former one.
    #[serde(serialize_with = "sanitize::path")]
    pub mountpoint: PathBuf,
    /// Path of the store.
    #[serde(serialize_with = "sanitize::path")]
    pub store: PathBuf,
    /// `st_dev` of the mount's files.
    pub device: u64,
    /// PID of the supervisor.
    pub supervisor_pid: u32,
    /// PID of the server; `None` while a successor is being started.
    pub server_pid: Option<u32>,
    /// Version of the supervisor.
    pub version: String,
    /// Version of the server; `None` until the server has reported it.
    pub server_version: Option<String>,
    /// Path of the server's program at its start.
    #[serde(serialize_with = "sanitize::optional_path")]
    pub server_program: Option<PathBuf>,
    /// The parts of the server's sandbox that this kernel does not support, as text; empty for a complete sandbox.
    pub server_lacks: Vec<String>,
    /// Number of servers that were started to replace another server.
    pub restarts: u64,
    /// End of the most recent server that has ended.
    pub last_end: Option<ServerEnd>,
    /// Number of consecutive servers that ended soon after their start; the delay of the next start grows with it.
    pub early_ends: u32,
    /// Time of the next start of a server, in seconds since 1970, while the start is delayed.
    pub next_start: Option<f64>,
    /// True after a lazy unmount: no path leads to the mount, but mappings of its files exist.
    pub detached: bool,
    /// Log of supervisor and server; `None` if the supervisor runs in the foreground and logs to standard error.
    #[serde(serialize_with = "sanitize::optional_path")]
    pub log: Option<PathBuf>,
    /// Serve mode as requested: `auto`, `kernel`, `passthrough` or `decode`.
    pub serve: String,
    /// The kernel's read-ahead for files served by decode; `None` if sysfs does not show the mount.
    #[serde(rename = "read_ahead_bytes")]
    pub read_ahead: Option<Bytes>,
    /// Location of backings, or of the metadata for kernel decode: a directory or `memory`; `None` if there are none,
    /// with the reason in `cache_why`.
    pub cache: Option<String>,
    /// Why the cache is not in the expected location.
    pub cache_why: Option<String>,
    /// Limit of all backings, in bytes.
    pub cache_size: Bytes,
    /// Bytes that all backings occupy.
    pub cache_used: Bytes,
    /// Status of each template.
    pub templates: Vec<TemplateStatus>,
    /// Counters since the start of the mount, by name.
    pub counters: BTreeMap<String, u64>,
    /// Durations of requests since the start of the mount, by operation: `read` and `open`.
    pub latencies: BTreeMap<String, Latency>,
}

/// How a file of a mount is served. Unlike [`Serving`], which the inode number determines, this tells the two kinds of
/// backings apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Served {
    /// The kernel decodes the packs.
    Kernel,
    /// Passthrough to a decompressed copy.
    Passthrough,
    /// The server decodes.
    Decode,
}

impl Served {
    /// Returns how a file is served whose inode number stands for `serving`, in a mount with backings of this kind.
    pub fn of(serving: Serving, kind: BackingKind) -> Served {
        match (serving, kind) {
            (Serving::Decode, _) => Served::Decode,
            (Serving::Passthrough, BackingKind::Copy) => Served::Passthrough,
            (Serving::Passthrough, BackingKind::Kernel) => Served::Kernel,
        }
    }

    /// Returns the name used in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Served::Kernel => "kernel",
            Served::Passthrough => "passthrough",
            Served::Decode => "decode",
        }
    }
}

impl FromStr for Served {
    type Err = Error;

    fn from_str(text: &str) -> Result<Served> {
        let all = [Served::Kernel, Served::Passthrough, Served::Decode];
        all.into_iter().find(|served| served.name() == text).ok_or_else(|| {
            Error::usage(format!("invalid way of serving '{text}'")).hint("use kernel, passthrough or decode")
        })
    }
}

/// Status of one template.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TemplateStatus {
    /// The template.
    pub digest: Digest,
    /// How the next open of its largest file is served.
    pub serving: Served,
    /// Reason for serving the largest file by decode; `None` if that file has a backing, or gets a backing at the first
    /// open.
    pub why: Option<String>,
    /// Number of processes that map the template; `None` if unknown. The supervisor reports 0; the command line counts
    /// the processes.
    pub clones: Option<u64>,
    /// Bytes of its files in backings, including backings that are being filled; with kernel decode the bytes of the
    /// metadata.
    pub hydrated_bytes: Bytes,
    /// Status of each file.
    pub files: Vec<FileStatus>,
}

/// Status of one file of a template.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileStatus {
    /// Name.
    pub name: String,
    /// Length, in bytes.
    pub size: Bytes,
    /// How the next open is served.
    pub serving: Served,
    /// Why the file is served by decode.
    pub why: Option<String>,
    /// Bytes of data in its backing, even while the backing is being filled; with kernel decode the bytes of the
    /// metadata.
    pub hydrated_bytes: Bytes,
    /// True if the backing is complete and verified.
    pub hydrated: bool,
}

/// Page cache use of one backing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Residency {
    /// Kind of the backing.
    pub kind: BackingKind,
    /// The template.
    pub digest: Digest,
    /// Name of the file.
    pub file: String,
    /// Bytes of the backing that are in the page cache.
    pub resident_bytes: Bytes,
    /// Length of the metadata for kernel decode, which was written through the page cache and counts in full.
    pub metadata_bytes: Bytes,
}

impl MountStatus {
    /// Builds the status from the supervisor's state. If the store cannot be read, logs the reason and leaves
    /// `templates` empty.
    pub fn new(snapshot: Snapshot, mount: &Mount) -> MountStatus {
        let templates = TemplateStatus::all(&snapshot).unwrap_or_else(|error| {
            log::warn!("{error}");
            Vec::new()
        });
        MountStatus { templates, ..MountStatus::without_templates(snapshot, mount) }
    }

    /// Builds the status from the supervisor's state alone: does not read the store, and leaves `templates` empty.
    pub fn without_templates(snapshot: Snapshot, mount: &Mount) -> MountStatus {
        let Snapshot { options, chosen, server, .. } = snapshot;
        let version = server.as_ref().map(|s| s.version.clone()).filter(|v| !v.is_empty());
        MountStatus {
            mountpoint: options.mountpoint,
            store: options.store,
            device: snapshot.device,
            supervisor_pid: snapshot.supervisor.pid,
            server_pid: server.as_ref().map(|s| s.process.pid),
            version: snapshot.version,
            server_version: version,
            server_lacks: server.as_ref().map(|s| s.lacks.clone()).unwrap_or_default(),
            server_program: server.map(|s| s.program),
            restarts: snapshot.restarts,
            last_end: snapshot.last_end,
            early_ends: snapshot.early_ends,
            next_start: snapshot.next_start,
            detached: mount.detached,
            log: (!options.foreground).then(|| mount.dir.join(LOG_FILE)),
            serve: options.serve.name().to_owned(),
            read_ahead: read_ahead::get(snapshot.device).ok(),
            cache: match &chosen.cache {
                Cache::Directory(dir) => Some(dir.display().to_string()),
                Cache::Memory => Some("memory".to_owned()),
                Cache::Nowhere(_) => None,
            },
            cache_why: match &chosen.cache {
                Cache::Nowhere(why) => Some(why.clone()),
                _ => chosen.why,
            },
            cache_size: chosen.most,
            cache_used: Bytes::new(snapshot.backings.iter().map(|b| b.reserved).sum()),
            templates: Vec::new(),
            counters: snapshot.counters,
            latencies: snapshot.latencies,
        }
    }
}

impl TemplateStatus {
    /// Returns the status of all templates of the mount's store.
    ///
    /// # Errors
    /// Returns an error if the store cannot be read.
    pub fn all(snapshot: &Snapshot) -> Result<Vec<TemplateStatus>> {
        let store = Store::open(&snapshot.options.store)?;
        Ok(store.digests()?.iter().filter_map(|digest| template(&store, digest, snapshot)).collect())
    }
}

fn template(store: &Store, digest: &Digest, snapshot: &Snapshot) -> Option<TemplateStatus> {
    let template = store.template(digest).inspect_err(|e| log::warn!("{e}")).ok()?;
    let no_cache = match &snapshot.chosen.cache {
        Cache::Nowhere(why) => Some(why.clone()),
        _ => None,
    };
    let files: Vec<FileStatus> = template
        .files()
        .iter()
        .map(|file| {
            let key = FileKey { digest: *digest, file: file.name.clone() };
            let backing = snapshot.backings.iter().find(|b| b.key == key);
            let is_disk = snapshot.options.serve == ServeMode::Kernel && file.kind == FileKind::Blob;
            let why = match backing {
                Some(backing) => backing.why.clone(),
                None if is_disk => Some("files of kind blob are served by decode".to_owned()),
                None => no_cache.clone(),
            };
            let has_backing = backing.is_some_and(|b| b.id.is_some());
            let serving = match snapshot.options.serve {
                _ if file.size == Bytes::ZERO => Serving::Decode,
                ServeMode::Auto if why.is_some() => Serving::Decode,
                ServeMode::Kernel if !has_backing || why.is_some() => Serving::Decode,
                ServeMode::Decode => Serving::Decode,
                ServeMode::Auto | ServeMode::Kernel | ServeMode::Passthrough => Serving::Passthrough,
            };
            FileStatus {
                name: file.name.clone(),
                size: file.size,
                serving: Served::of(serving, snapshot.chosen.kind),
                why,
                hydrated_bytes: Bytes::new(backing.map_or(0, |b| b.filled)),
                hydrated: has_backing && backing.is_some_and(|b| b.why.is_none()),
            }
        })
        .collect();
    // The largest file stands for the template: it is the guest memory, and users ask how that memory is served.
    let largest = files.iter().max_by_key(|f| f.size);
    Some(TemplateStatus {
        digest: *digest,
        serving: largest.map_or(Served::Decode, |f| f.serving),
        why: largest.and_then(|f| f.why.clone()),
        clones: Some(0),
        hydrated_bytes: files.iter().map(|f| f.hydrated_bytes).sum(),
        files,
    })
}
