//! The properties of a clone that shares the memory of its template, and the result for each.

use serde::Serialize;

use crate::error::Error;
use crate::store::Digest;

/// A property of a clone that shares the memory of its template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Property {
    /// The process exists and was inspected.
    Process,
    /// The process maps the whole memory of the template, and no other template.
    Template,
    /// The supervisors of the mounts respond.
    Mount,
    /// The files are served as expected.
    Serving,
    /// No mapping is shared.
    Private,
    /// 2 MiB entries are possible.
    HugeEntries,
    /// No page is locked.
    NotLocked,
    /// The pages were not copied without need.
    NotCopied,
    /// The compared pages have the bytes of the template.
    Bytes,
}

impl Property {
    /// Returns the property as a word.
    pub fn name(self) -> &'static str {
        match self {
            Property::Process => "process",
            Property::Template => "template",
            Property::Mount => "mount",
            Property::Serving => "serving",
            Property::Private => "private",
            Property::HugeEntries => "huge-entries",
            Property::NotLocked => "not-locked",
            Property::NotCopied => "not-copied",
            Property::Bytes => "bytes",
        }
    }
}

/// The result for one property.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The property.
    pub name: Property,
    /// True if the property is proven.
    pub ok: bool,
    /// What was found.
    pub why: String,
    /// What to do, if the property is not proven.
    pub remedy: Option<String>,
}

/// A finding: what was found if the property holds, otherwise why not, and the remedy.
pub(super) type Finding = Result<String, (String, String)>;

impl Check {
    pub(super) fn new(name: Property, finding: Finding) -> Check {
        match finding {
            Ok(why) => Check { name, ok: true, why, remedy: None },
            Err((why, remedy)) => Check { name, ok: false, why, remedy: Some(remedy) },
        }
    }

    /// Creates the result for a process that has exited.
    pub fn exited() -> Check {
        let why = "the process does not exist in this PID namespace, or has exited".to_owned();
        Check::new(Property::Process, Err((why, "run 'stencil ps' to list the clones".to_owned())))
    }

    /// Creates the result for a process that could not be inspected.
    pub fn not_inspected(error: &Error) -> Check {
        Check::new(Property::Process, Err(of_error(error, "run the command as root on the host")))
    }

    /// Creates the result for a clone of another template than the expected one.
    pub fn other_template(found: &Digest, expected: &Digest) -> Check {
        Check::new(Property::Template, Err(other_template(found, expected)))
    }
}

pub(super) fn other_template(found: &Digest, expected: &Digest) -> (String, String) {
    let expected = expected.short();
    (
        format!("the clone is of template {}, expected {expected}", found.short()),
        format!("launch the clone from template {expected}"),
    )
}

pub(super) fn of_error(error: &Error, remedy: &str) -> (String, String) {
    (error.to_string(), error.hint_text().unwrap_or(remedy).to_owned())
}
