//! Transfer of templates between hosts and formats.

pub mod diffs;
pub mod hostile;
pub mod hosts;
pub mod import_formats;
pub mod promises;
pub mod rsync;
pub mod snapshot_folders;
pub mod stream;
pub mod trust;
