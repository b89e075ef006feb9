//! The records of launched clones in `runtime_dir()/clones`: one directory for each clone, and one directory for all
//! simulated clones of a launch.
//!
//! The directory is made before the process and removed after it. So every process of a clone has a directory, and a
//! directory without a living process belongs to a clone that has exited. A simulated clone gets its record after its
//! process, which is bound to its launcher until all are recorded.
//!
//! The clones of one call belong to one [`Launch`], which holds them by one marker file. Removing the marker releases
//! all clones at once. If the launcher dies before, the next command stops the remaining clones ([`sweep`]).

mod ending;
mod entry;
mod exit_record;
mod launch;
mod layout;
pub mod ports;
pub mod process_tree;
mod records;
mod removal;
mod shared_record;

pub use ending::Ending;
pub use entry::{
    API_SOCKET, CloneStore, Entry, Kind, LOG, QMP_SOCKET, SERIAL_INPUT, SERIAL_LOG, Touched, VMM_LOG,
};
pub use exit_record::save_endings;
pub use launch::{Launch, NewEntry, abort, sweep};
pub use layout::{is_held, random_id, runtime_root};
pub use records::{find, list, list_and_unread, of_launch, wait_for_watchdogs};
pub use removal::remove_all;
pub use shared_record::{SharedRecord, simulated_log};
