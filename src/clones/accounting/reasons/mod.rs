//! Why clones take more memory than they need: a code, the bytes that it explains, and a remedy.

mod caches;
mod code;
mod contents;
mod copied_file;
mod figures;
mod serving;

use super::survey::Survey;
use crate::control::Mount;
use crate::error::Result;

pub use code::{Code, Reasons};
pub use figures::all_copied;
pub use serving::Statuses;

/// Finds the reasons for the memory of the clones of these mounts. Reads the copied pages of every clone and the template
/// pages beside them, and the page cache of every template.
///
/// # Errors
/// Returns an error if a template or the memory of a clone cannot be read.
pub fn reasons(mounts: &[Mount], survey: &Survey) -> Result<Reasons> {
    reasons_with(mounts, Statuses::new(), survey)
}

/// Same as [`reasons`], for a caller that knows the status of some mounts.
///
/// # Errors
/// Same as [`reasons`].
pub fn reasons_with(mounts: &[Mount], statuses: Statuses, survey: &Survey) -> Result<Reasons> {
    let mut reasons = Reasons { clones: vec![Vec::new(); survey.clones.len()], ..Reasons::default() };
    figures::add(survey, &mut reasons);
    serving::add(mounts, statuses, survey, &mut reasons)?;
    caches::add(mounts, survey, &mut reasons)?;
    contents::add(survey, &mut reasons)?;
    copied_file::add(survey, &mut reasons)?;
    Ok(reasons)
}
