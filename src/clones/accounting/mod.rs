//! Memory accounting: the pages that each clone has copied, and the RAM that all clones take.
//!
//! `host_bytes` is exactly the sum of its parts: template pages in RAM (counted once), the RAM of the store and its
//! daemons, distinct private pages, page tables, the clones' memory outside templates, and the clones' disks in RAM.

mod dirty;
mod disks;
mod frames;
mod groups;
mod original;
mod process;
mod reasons;
mod records;
mod replaced;
pub mod residency;
pub mod sampler;
mod shares;
mod survey;
mod templates;
mod totals;

pub use dirty::{DirtyRange, dirty_of, measure_of};
pub use groups::{By, Group, groups};
pub use original::Originals;
pub use process::{CloneMemory, Measured, runs_kvm};
pub use reasons::{Code, Reasons, Statuses, all_copied, reasons, reasons_with};
pub use replaced::{Replaced, replaced};
pub use shares::{Parts, Shares};
pub use survey::{CloneRow, Density, Survey, survey, template_bytes};
pub use templates::TemplateMemory;
pub use totals::Totals;
