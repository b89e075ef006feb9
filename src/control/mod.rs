//! Communication between `stencil` and `stencil-mountd`: records of mounts, requests and replies.
//!
//! A supervisor owns one directory in `runtime_dir()/mounts` with its record (`mount.json`), its control socket
//! (`control.sock`) and its log. [`mounts()`] reads the records; a [`Mount`] sends requests to its supervisor.

mod kernel_decode;
mod lease;
mod mounts;
mod protocol;
pub mod runtime;

pub use kernel_decode::probe_kernel_decode;
pub use lease::{Lease, LeaseHolder, RemovalMark, leased, leases, removals};
pub use mounts::client::{ask, request_refresh, request_restart, request_unmount};
pub use mounts::condemn::Condemnation;
pub use mounts::daemon::{exec_supervisor, find_daemon, start_supervisor};
pub use mounts::listing::{
    Listing, every_mount, every_mount_of, is_of_store, list, lives, mount_of, mounts, mounts_and_dead,
    mounts_of, with_store, with_store_or_error,
};
pub use mounts::mount_lock::MountLock;
pub use mounts::registry::{CONTROL_SOCKET, LOG_FILE, Mount, Record, RecordDir, socket_path};
pub use mounts::status::{FileStatus, MountStatus, Residency, Served, TemplateStatus};
pub use protocol::in_flight::{
    INFLIGHT_NAME, InFlight, InFlightTable, Op, PARKED_SLOTS, Phase, RequestInfo, THREAD_SLOTS,
};
pub use protocol::messages::{CONTROL_VERSION, Failure, MAX_INODES, Request, Response, UnmountMode};
pub use protocol::options::{
    DEFAULT_READ_AHEAD, MountOptions, OnDamage, ServeMode, parse_read_ahead, parse_seconds,
};
pub use protocol::snapshot::{
    BackingKind, BackingRow, Cache, Chosen, CondemnedRow, FileKey, Latency, ServerEnd, ServerRow, Snapshot,
    Stage,
};
pub use protocol::wire::{Channel, MAX_MESSAGE, Received};
pub use runtime::runtime_dir;

pub use mounts::places;
pub use protocol::ledger;
