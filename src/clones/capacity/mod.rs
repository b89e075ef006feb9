//! How many more clones of a template fit: the resources of the host and of a cgroup, divided by what a clone takes.
//!
//! What a clone takes follows from measurements of the present clones and of a recording. `growth` and `resources`
//! are pure functions over these measurements.

mod growth;
mod limits;
mod present;
mod recorded;
mod report;
mod resources;

pub use growth::Shape;
pub use recorded::{Recorded, recorded};
pub use report::{Capacity, Request, TemplateMemory, capacity};
pub use resources::{Amount, Bounds, Kind, Resource};
