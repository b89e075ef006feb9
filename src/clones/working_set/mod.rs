//! Working sets: recording the pages that clones use, and reading these pages before clones need them.

mod compare;
mod record;
mod warm;

pub use compare::{Comparison, compare};
pub use record::{count, drop_unmapped, record};
pub use warm::{Warmed, pin, warm};
