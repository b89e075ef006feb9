//! Transfer of whole templates between stores as one stream: same digests, records as they are stored.

mod incoming;
mod load;
mod save;

pub use incoming::Incoming;
pub use load::{LoadRequest, Loaded, LoadedTemplate};
pub use save::{SaveRequest, Saved, SavedTemplate};
