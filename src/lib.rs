//! Stencil: template memory for microVMs and sandboxes.
//!
//! The library is built in layers. A file imports only from lower layers or from its own directory, and imports form no
//! circle (`tests/cli/layers.rs` checks both):
//!
//! | layer | modules |
//! |---|---|
//! | 0 | [`units`], [`error`], [`progress`], [`sanitize`] |
//! | 1 | [`sys`]: the only unsafe code; one kernel interface per file |
//! | 2 | [`store`] (independent of guest memory layout), [`memory`] (independent of the store) |
//! | 3 | [`control`]: the protocol between `stencil` and `stencil-mountd` |
//! | 4 | [`clones`]: identifies memory by path and inode, as a VMM does |
//! | 5 | [`cli`] |

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

pub mod cli;
pub mod clones;
pub mod control;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod memory;
pub mod progress;
pub mod sanitize;
pub mod store;
pub mod sys;
pub mod units;
