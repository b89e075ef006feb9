//! The store: import, export, damage, repair, collection, locks.

pub mod bad_input;
pub mod crash;
pub mod damage;
pub mod flips;
pub mod format;
pub mod gc;
pub mod gc_room;
pub mod gc_waits;
pub mod hostile;
pub mod limits;
pub mod repair;
pub mod roundtrip;
pub mod unreadable;
