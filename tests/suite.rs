//! The scenario suite: one folder per theme, one file per scenario; `support` holds the shared code, `alone` the scenarios
//! that need the host for themselves.

mod alone;
mod capture;
mod cli;
mod clones;
mod failover;
mod kernel;
mod mount;
mod packaging;
mod removal;
mod store;
mod support;
mod transfer;
mod vmm;
