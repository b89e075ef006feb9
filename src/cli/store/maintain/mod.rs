//! Commands for a whole store: check, free space, remove.

pub mod du;
pub mod gc;
pub mod verify;
pub mod whole_store;
