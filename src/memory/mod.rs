//! Memory backends with the options, semantics and error texts of QEMU's `memory-backend-file` and
//! `memory-backend-ram`.
//!
//! ```text
//! text ──options──▶ Options ──plan──▶ Plan ──backend──▶ Backend ──dirty──▶ page ranges
//!       (grammar)           (12 rows)       (open, map)
//! ```
//! Everything left of [`Backend`] is pure. The tables in `docs/reference/semantics.md` are the specification; a test
//! executes them.

mod backend;
mod dirty;
mod file;
mod grammar;
mod input;
mod json;
mod note;
#[cfg(feature = "internals")]
mod observed;
mod option_notes;
mod options;
mod plan;
mod row;
mod zeros;

#[cfg(feature = "rust-vmm")]
pub use crate::sys::memory::guest_region::CopiedPages;
pub use crate::sys::memory::mapping::{Protection, Sharing};
pub use backend::Backend;
pub use dirty::PageRange;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub use dirty::page_ranges;
pub use note::Note;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub use observed::{Observed, observe, parse_smaps};
pub use options::{FileOptions, NumaPolicy, ObjectType, OnOffAuto, Options};
pub use plan::{FileFacts, Layout, Numa, Plan, Source};
pub use row::{OpenMode, Role, Row, row};
#[cfg(feature = "internals")]
#[doc(hidden)]
pub use zeros::zero_runs;
