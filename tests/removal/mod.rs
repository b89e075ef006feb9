//! Removal of templates, and the search for their users.

pub mod leases;
pub mod rm;
pub mod soak;
pub mod store_filter;
pub mod store_in_use;
pub mod unseen_clones;
pub mod words;
