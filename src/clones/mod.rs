//! Clones: processes that map a template.

pub mod capture;
pub mod launch;
pub mod qmp;
pub mod recipe;
pub mod registry;
