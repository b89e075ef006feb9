//! Clones: launches, recipes, disks, accounting, memory backends.

pub mod accounting;
pub mod check;
pub mod clock;
pub mod command;
pub mod counted_once;
pub mod density;
pub mod dirty_exact;
pub mod disks;
pub mod epochs;
pub mod jail;
pub mod others;
pub mod reasons;
pub mod recipe_clones;
pub mod recipe_edit;
pub mod shared_network;
pub mod simulated;
pub mod working_set;
