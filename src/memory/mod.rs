//! Memory backends: QEMU's `memory-backend-file` and `memory-backend-ram`, word for word.
//!
//! ```text
//! text ──options──▶ Options ──plan──▶ Plan ──backend──▶ Backend ──dirty──▶ page ranges
//!       (grammar)           (12 rows)       (open, map)
//! ```
//! Everything left of [`Backend`] is pure. `docs/semantics.md` holds the tables; a test executes them.

mod backend;
mod dirty;
mod file;
mod grammar;
mod input;
mod json;
mod observed;
mod options;
mod plan;

pub use crate::sys::mapping::{Protection, Sharing};
pub use backend::Backend;
pub use dirty::{PageRange, page_ranges};
pub use observed::{Observed, observe, parse_smaps};
pub use options::{FileOptions, NumaPolicy, ObjectType, OnOffAuto, Options};
pub use plan::{FileFacts, Layout, Note, Numa, OpenMode, Plan, Role, Row, Source, row};
