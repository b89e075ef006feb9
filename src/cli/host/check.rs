//! A check of the host and its result.

use serde::Serialize;

/// The result of a check, the better ones first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Stencil runs, with the restriction in `found`.
    Note,
    /// The check could not be made.
    Unknown,
    /// A requirement of Stencil is not met.
    Missing,
}

/// One check of the host.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    pub found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    pub fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    pub fn note(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
        Check { name, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.to_owned()) }
    }

    pub fn unknown(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
        Check { name, verdict: Verdict::Unknown, found: found.into(), remedy: Some(remedy.to_owned()) }
    }

    pub fn missing(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
        Check { name, verdict: Verdict::Missing, found: found.into(), remedy: Some(remedy.to_owned()) }
    }
}
