//! What a supervisor begins with: a new mount, or the mount of an earlier supervisor.

use std::path::PathBuf;

use stencilfs::control::{Chosen, MountOptions, ServerRow};
use stencilfs::sys::process::ProcessId;

use super::backings::Backings;
use super::removal::Removal;
use crate::supervisor::program::Program;

/// What a mount is, apart from its processes and descriptors.
#[derive(Debug, Clone)]
pub struct MountFacts {
    /// Options of the mount, with canonical paths.
    pub options: MountOptions,
    /// Identity of the store, for callers that know the store by another path.
    pub store_id: String,
    /// `st_dev` of all files of the mount.
    pub device: u64,
    /// The kernel's INIT request.
    pub init: Vec<u8>,
    /// The INIT reply that the kernel has; each later server must give the same.
    pub init_reply: Option<Vec<u8>>,
    /// Where backings lie.
    pub chosen: Chosen,
    /// Directory of the record.
    pub record: PathBuf,
    /// `st_dev` and `st_ino` of the page of counters.
    pub counters_page: (u64, u64),
}

/// What a new or restarted supervisor begins with.
#[derive(Debug)]
pub struct InitialState {
    /// The mount.
    pub mount: MountFacts,
    /// The program of its servers.
    pub program: Program,
    /// Its backings.
    pub backings: Backings,
    /// Its current server, if one was taken over.
    pub server: Option<ServerRow>,
    /// Servers that were killed before and may not have exited.
    pub leaving: Vec<ProcessId>,
    /// Condemned templates.
    pub removal: Removal,
    /// True once the mount has served: it is never given up.
    pub has_served: bool,
    /// Servers that were started in place of others.
    pub restarts: u64,
    /// True if a signal has asked for the end.
    pub draining: bool,
    /// Count of rings.
    pub rings: u32,
}
