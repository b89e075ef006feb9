//! Whole templates as one stream, from one store to another: same digests, blocks as they are stored.

mod incoming;
mod load;
mod save;

pub use incoming::Incoming;
pub use load::{LoadRequest, Loaded, LoadedTemplate, Moved};
pub use save::{SaveRequest, Saved, SavedTemplate};

/// Blocks that are handed on together.
const BATCH: usize = 16;
