//! Clones: processes that map a template. This layer works with paths and inodes, as a VMM does.

pub mod accounting;
pub mod agent;
pub mod audit;
pub mod baseline;
pub mod capacity;
pub mod capture;
pub mod check;
pub mod epochs;
pub mod find;
mod helper_process;
pub mod launch;
pub mod migration;
pub mod qmp;
mod ranges;
pub mod recipe;
pub mod recording;
pub mod registry;
pub mod removal;
pub mod stop;
pub mod vmm;
pub mod vmm_api;
pub mod working_set;
mod zero_memory;

/// Formats a number with its noun: `1 clone`, `2 clones`.
pub(crate) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
