//! The scenario suite: one folder per theme, one file per scenario; `support` holds the shared code, `alone` the
//! scenarios that need the host for themselves.

#![allow(
    clippy::cast_lossless,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)]

mod alone;
mod capture;
mod cli;
mod clones;
mod failover;
mod kernel;
mod metrics;
mod mount;
mod packaging;
mod project;
mod removal;
mod store;
mod support;
mod transfer;
mod vmm;
