//! Code that the scenarios share.

pub mod actor;
pub mod browser;
pub mod daemon;
pub mod debian;
pub mod exporter;
pub mod holder;
pub mod host;
pub mod hosts;
pub mod memory_group;
pub mod mount;
pub mod pages;
pub mod store;
pub mod stream;
pub mod terminal;
pub mod vm;
