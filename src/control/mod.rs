//! The words between `stencil` and `stencil-mountd`: who serves a mount, what it is asked and what it answers.
//!
//! A supervisor owns one folder in `runtime_dir()/mounts`: its record (`mount.json`), its control socket
//! (`control.sock`) and its log. [`mounts`] reads the records; [`Mount`] asks the supervisor behind one.

mod beginning;
mod client;
mod condemn;
mod daemon;
mod inflight;
mod lease;
pub mod ledger;
mod listing;
mod options;
pub mod places;
mod protocol;
mod registry;
mod residency;
pub mod runtime;
mod snapshot;
mod status;
mod wire;

use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

pub use beginning::Beginning;
pub use client::{ask, request_refresh, request_restart, request_unmount};
pub use condemn::Condemnation;
pub use daemon::{become_supervisor, find_daemon, start_supervisor};
pub use inflight::{Asked, INFLIGHT_NAME, InFlight, InFlightTable, Op, PARKED_SLOTS, Phase, THREAD_SLOTS};
pub use lease::{Lease, LeaseHolder, RemovalMark, leased, leases, removals};
pub use listing::{
    DeadMount, Listing, every_mount, every_mount_of, is_of_store, list, lives, mounts, mounts_of,
};
pub use options::{MountOptions, ServeMode, parse_seconds};
pub use protocol::{CONTROL_VERSION, Failure, MAX_INODES, Request, Response, UnmountMode};
pub use registry::{CONTROL_SOCKET, LOG_FILE, Mount, Record, RecordDir};
pub use runtime::runtime_dir;
pub use snapshot::{BackingRow, Cache, Chosen, CondemnedRow, FileKey, ServerEnd, ServerRow, Snapshot, Stage};
pub use status::{FileStatus, MountStatus, Residency, TemplateStatus};
pub use wire::{Channel, MAX_MESSAGE, Received};

/// A path to the control socket in the open folder of a record that fits into a socket's address, however deep the
/// folder lies.
pub fn socket_path(folder: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}/{CONTROL_SOCKET}", folder.as_fd().as_raw_fd()).into()
}
