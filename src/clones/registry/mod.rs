//! The records of launched clones: one directory for each clone in `runtime_dir()/clones`.
//!
//! The directory is made before the process and removed after it. So every process of a clone has a directory, and a
//! directory without a living process belongs to a clone that has exited.
//!
//! The clones of one call belong to one [`Launch`], which holds them by one marker file. Removing the marker releases
//! all clones at once. If the launcher dies before, the next command stops the remaining clones ([`sweep`]).

mod entry;
mod exit_record;
mod launch;
mod layout;
pub mod ports;
pub mod process_tree;
mod records;

pub use entry::{
    API_SOCKET, CloneStore, Entry, Kind, LOG, QMP_SOCKET, SERIAL_INPUT, SERIAL_LOG, Touched, VMM_LOG,
};
pub use exit_record::Ending;
pub use launch::{Launch, NewEntry, abort, sweep};
pub use layout::{clones, is_held, random_id, runtime_root};
pub use records::{find, list, list_and_unread, wait_for_watchdogs};
