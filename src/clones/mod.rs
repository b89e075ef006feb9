//! Clones: processes that map a template.

pub mod qmp;
