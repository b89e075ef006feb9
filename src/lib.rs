//! Stencil: template memory for microVMs and sandboxes.
//!
//! The library is built in floors; a file imports only from lower floors or from its own folder
//! (`tests/layers.rs` checks it):
//!
//! | floor | modules |
//! |---|---|
//! | 0 | [`units`], [`error`], [`progress`], [`shown`] |
//! | 1 | [`sys`]: the only unsafe code, one kernel interface a file |
//! | 2 | [`store`] (knows no memory), [`memory`] (knows no store) |
//! | 3 | [`control`]: the words between `stencil` and `stencil-mountd` |
//! | 4 | [`clones`]: sees paths and inodes, as a VMM does |
//! | 5 | [`cli`] |

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod cli;
pub mod clones;
pub mod control;
pub mod error;
pub mod memory;
pub mod progress;
pub mod shown;
pub mod store;
pub mod sys;
pub mod units;
