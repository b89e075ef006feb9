//! Why clones take more memory than they need: a code, the bytes that it explains, and a remedy.

mod code;
mod contents;
mod figures;

use super::survey::Survey;
use crate::error::Result;

pub use code::{Code, Reasons};
pub use figures::all_copied;

/// Finds the reasons for the memory of the clones. Reads the copied pages of every clone, and the template pages beside
/// them.
///
/// # Errors
/// Returns an error if a template or the memory of a clone cannot be read.
pub fn reasons(survey: &Survey) -> Result<Reasons> {
    let mut reasons = Reasons { clones: vec![Vec::new(); survey.clones.len()], ..Reasons::default() };
    figures::add(survey, &mut reasons);
    contents::add(survey, &mut reasons)?;
    Ok(reasons)
}
