//! The initial state of a supervisor: a new mount, or the mount of an earlier supervisor.

use std::path::PathBuf;

use stencilfs::control::{Chosen, MountOptions, ServerRow};
use stencilfs::sys::process::ProcessId;

use super::backings::Backings;
use super::removal::Removal;
use crate::supervisor::program::Program;

/// Properties of a mount that do not depend on its processes and descriptors.
#[derive(Debug, Clone)]
pub struct MountFacts {
    /// The options of the mount, with canonical paths.
    pub options: MountOptions,
    /// The identity of the store, for callers that use another path of the store.
    pub store_id: String,
    /// `st_dev` of all files of the mount.
    pub device: u64,
    /// The kernel's INIT request.
    pub init: Vec<u8>,
    /// The INIT reply that was sent to the kernel; the INIT replies of later servers must be equal.
    pub init_reply: Option<Vec<u8>>,
    /// The location of the backings, and the limit on their size.
    pub chosen: Chosen,
    /// The directory of the record.
    pub record: PathBuf,
    /// `st_dev` and `st_ino` of the counters page.
    pub counters_page: (u64, u64),
}

/// The initial state of a new or restarted supervisor.
#[derive(Debug)]
pub struct InitialState {
    /// The mount.
    pub mount: MountFacts,
    /// The program that servers are started from.
    pub program: Program,
    /// The backings.
    pub backings: Backings,
    /// The current server, if a server was taken over.
    pub server: Option<ServerRow>,
    /// Servers that were killed, and may not have exited yet.
    pub leaving: Vec<ProcessId>,
    /// The condemned templates.
    pub removal: Removal,
    /// True if a server of the mount has served the kernel. The supervisor then starts another server after each
    /// failure, however many servers fail, and keeps the mount.
    pub has_served: bool,
    /// Number of servers that were started to replace other servers.
    pub restarts: u64,
    /// True if a signal has requested the end of the mount.
    pub draining: bool,
    /// The ring in the counters page.
    pub rings: u32,
}
