//! Clones: processes that map a template.

pub mod qmp;
pub mod recipe;
