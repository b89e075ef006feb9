//! Template memory for virtual machine monitors: one copy in RAM for hundreds of clones.
//!
//! A *template* is the memory of a prepared guest. The command `stencil` imports it into a store, and a mount of the
//! store serves it as a read-only file. This crate is for a VMM that runs guests on such a file:
//!
//! | module | for |
//! |---|---|
//! | [`memory`] | mapping a template copy-on-write, with the options and errors of QEMU's memory backends; the pages that this process has copied |
//! | [`templates`] | reading templates of a store without a mount, and the path to map in a mount |
//! | [`units`], [`error`] | bytes, pages and offsets as types; errors with a code and a remedy |
//!
//! A VMM maps the file of a template, runs its guest, and asks which pages the guest has copied. The answer is exact to
//! the page and needs no preparation:
//!
//! ```
//! use stencilfs::memory::Backend;
//! use stencilfs::units::{MemoryOffset, PAGE_SIZE};
//!
//! # fn main() -> stencilfs::error::Result<()> {
//! # let template = tempfile::NamedTempFile::new().unwrap();
//! # std::fs::write(template.path(), vec![7; 1 << 20]).unwrap();
//! # let path = template.path();
//! // For example /srv/templates/templates/web/1/memory
//! let memory = Backend::template(path)?;
//! // A guest would run here, with the memory at `memory.as_ptr()`.
//! memory.write_at(MemoryOffset::new(3 * PAGE_SIZE), b"copied")?;
//! let copied: u64 = memory.dirty()?.iter().map(|range| range.count.get()).sum();
//! assert_eq!(copied, 1);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `cli` | yes | the command `stencil` and its dependencies. A VMM sets `default-features = false` |
//! | `rust-vmm` | no | [memory regions](memory) of the crate vm-memory, with the copied pages as their dirty bitmap |
//! | `internals` | no | modules for `stencil` and `stencil-mountd`, which are hidden here and change without notice |
//!
//! ```toml
//! stencilfs = { version = "0.1", default-features = false, features = ["rust-vmm"] }
//! ```
//!
//! The example `vmm` boots a guest on a template. Linux 6.9 or later and x86-64 are needed.

#![cfg_attr(
    test,
    allow(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
    )
)]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[cfg(feature = "cli")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod cli;
#[cfg(feature = "cli")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod clones;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod control;
pub mod error;
#[cfg(all(feature = "cli", any(test, fuzzing)))]
pub mod fuzz;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod json_log;
pub mod memory;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod progress;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod sanitize;
#[cfg(not(feature = "internals"))]
#[allow(dead_code, unused_imports, reason = "the programs use the rest")]
mod sanitize;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod store;
#[cfg(not(feature = "internals"))]
#[allow(dead_code, unused_imports, reason = "the programs use the rest")]
mod store;
#[cfg(feature = "internals")]
#[cfg_attr(not(document_internals), doc(hidden))]
pub mod sys;
#[cfg(not(feature = "internals"))]
#[allow(dead_code, unused_imports, reason = "the programs use the rest")]
mod sys;
pub mod templates;
pub mod units;

#[cfg(feature = "rust-vmm")]
pub use vm_memory;
