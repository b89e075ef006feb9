//! How a mount does: what its supervisor knows, and what its store holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::options::ServeMode;
use super::registry::{LOG_FILE, Mount};
use super::snapshot::{Cache, FileKey, ServerEnd, Snapshot};
use crate::error::Result;
use crate::shown;
use crate::store::{Digest, Serving, Store};
use crate::units::Bytes;

/// One mount, as `status --json` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where it is mounted, or was before a lazy unmount.
    #[serde(serialize_with = "shown::path")]
    pub mountpoint: PathBuf,
    /// The store that it serves.
    #[serde(serialize_with = "shown::path")]
    pub store: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Process that holds the mount.
    pub supervisor_pid: u32,
    /// Process that answers the kernel; none while a successor is being started.
    pub server_pid: Option<u32>,
    /// Version of the supervisor.
    pub version: String,
    /// Version of the server; none until it has said so.
    pub server_version: Option<String>,
    /// Program of the server, as it was named when it was started.
    #[serde(serialize_with = "shown::optional_path")]
    pub server_program: Option<PathBuf>,
    /// The parts of the server's sandbox that this kernel could not do, in words; none where it is whole.
    pub server_lacks: Vec<String>,
    /// How many servers were started in place of one that died or was replaced.
    pub restarts: u64,
    /// How the last of those ended; none where none has.
    pub last_end: Option<ServerEnd>,
    /// Servers in a row that have ended soon after their start: each next one waits longer.
    pub early_ends: u32,
    /// When the next server is started, in seconds since 1970, while none is for such a pause.
    pub next_start: Option<f64>,
    /// True after a lazy unmount: no path leads to it, mappings of it still live.
    pub detached: bool,
    /// The log of both; none where the supervisor runs in the foreground, and its standard error has it.
    #[serde(serialize_with = "shown::optional_path")]
    pub log: Option<PathBuf>,
    /// `auto`, `passthrough` or `decode`, as asked for.
    pub serve: String,
    /// Where passthrough backings live: a directory, or `memory`, or nothing with the reason in `cache_why`.
    pub cache: Option<String>,
    /// Why the cache is not where it was expected.
    pub cache_why: Option<String>,
    /// Most bytes that backings may take.
    pub cache_size: Bytes,
    /// Bytes that backings take now.
    pub cache_used: Bytes,
    /// What is served, and how.
    pub templates: Vec<TemplateStatus>,
    /// What was done since the mount began, by name.
    pub counters: BTreeMap<String, u64>,
}

/// How one template is served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TemplateStatus {
    /// Which.
    pub digest: Digest,
    /// What the next open of its RAM gets.
    pub serving: Serving,
    /// Why not passthrough, in words; none where it is, or will be at the first open.
    pub why: Option<String>,
    /// Processes that map it, where that is known. The supervisor leaves it 0; the command line counts.
    pub clones: Option<u64>,
    /// Bytes of its files that are in backings, those being filled included.
    pub hydrated_bytes: Bytes,
    /// Its files.
    pub files: Vec<FileStatus>,
}

/// How one file of a template is served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileStatus {
    /// Its name.
    pub name: String,
    /// Its length.
    pub size: Bytes,
    /// What the next open gets.
    pub serving: Serving,
    /// Why not passthrough.
    pub why: Option<String>,
    /// Bytes of data in its backing, also while that is being filled.
    pub hydrated_bytes: Bytes,
    /// True when the backing is complete and verified.
    pub hydrated: bool,
}

/// Page cache of one passthrough backing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Residency {
    /// Template.
    pub digest: Digest,
    /// File of it.
    pub file: String,
    /// Bytes of the backing in the page cache.
    pub resident_bytes: Bytes,
}

impl MountStatus {
    /// From what the supervisor knows. A store that cannot be read leaves `templates` empty; the reason is logged.
    pub fn new(snapshot: Snapshot, mount: &Mount) -> MountStatus {
        let templates = templates(&snapshot).unwrap_or_else(|error| {
            log::warn!("{error}");
            Vec::new()
        });
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
            templates,
            counters: snapshot.counters,
        }
    }
}

fn templates(snapshot: &Snapshot) -> Result<Vec<TemplateStatus>> {
    let store = Store::open(&snapshot.options.store)?;
    Ok(store.digests()?.iter().filter_map(|digest| template(&store, digest, snapshot)).collect())
}

fn template(store: &Store, digest: &Digest, snapshot: &Snapshot) -> Option<TemplateStatus> {
    let template = store.template(digest).inspect_err(|e| log::warn!("{e}")).ok()?;
    let never = match &snapshot.chosen.cache {
        Cache::Nowhere(why) => Some(why.clone()),
        _ => None,
    };
    let files: Vec<FileStatus> = template
        .files()
        .iter()
        .map(|file| {
            let key = FileKey { digest: *digest, file: file.name.clone() };
            let backing = snapshot.backings.iter().find(|b| b.key == key);
            let why = match backing {
                Some(backing) => backing.why.clone(),
                None => never.clone(),
            };
            let mode = snapshot.options.serve;
            let decode = file.size == Bytes::ZERO
                || mode == ServeMode::Decode
                || mode == ServeMode::Auto && why.is_some();
            FileStatus {
                name: file.name.clone(),
                size: file.size,
                serving: if decode { Serving::Decode } else { Serving::Passthrough },
                why,
                hydrated_bytes: Bytes::new(backing.map_or(0, |b| b.filled)),
                hydrated: backing.is_some_and(|b| b.id.is_some()),
            }
        })
        .collect();
    // What people ask about is the memory: the largest file speaks for the template.
    let largest = files.iter().max_by_key(|f| f.size);
    Some(TemplateStatus {
        digest: *digest,
        serving: largest.map_or(Serving::Decode, |f| f.serving),
        why: largest.and_then(|f| f.why.clone()),
        clones: Some(0),
        hydrated_bytes: files.iter().map(|f| f.hydrated_bytes).sum(),
        files,
    })
}
