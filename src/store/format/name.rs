//! Names of templates, tags and files.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};

/// Tag of a reference without a tag.
pub const DEFAULT_TAG: &str = "latest";

/// Maximum length of a name or tag in bytes.
pub(super) const MAX_NAME: usize = 128;

/// Minimum number of hex digits in a digest prefix.
const MIN_PREFIX: usize = 8;

/// Checks a name that is used as a file name: letters, digits, `.`, `_` and `-`, starting with a letter, a digit or
/// `_`, without `..`, at most `MAX_NAME` bytes.
///
/// # Errors
/// Returns a usage error with the rule that `text` violates; `what` names the kind of name in the message.
pub fn check_name(what: &str, text: &str) -> Result<()> {
    let invalid = |why: &str| {
        Err(Error::usage(format!("invalid {what} '{}': {why}", text.escape_debug())).hint(format!(
            "use at most {MAX_NAME} letters, digits, '.', '_' and '-', starting with a letter, a digit or '_'"
        )))
    };
    if text.is_empty() {
        return invalid("empty");
    }
    if text.len() > MAX_NAME {
        return invalid("too long");
    }
    if text.contains('/') {
        return invalid("contains '/'");
    }
    if text.contains("..") {
        return invalid("contains '..'");
    }
    if let Some(bad) = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c)) {
        return invalid(&format!("contains '{}'", bad.escape_debug()));
    }
    if text.starts_with(['.', '-']) {
        return invalid("starts with '.' or '-'");
    }
    Ok(())
}

/// A tag `NAME:TAG`, which points at a template.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TagName {
    name: String,
    tag: String,
}

impl TagName {
    /// Creates a tag from its two parts.
    ///
    /// # Errors
    /// Returns a usage error if a part is invalid, or if the name could be mistaken for a digest prefix.
    pub fn new(name: &str, tag: &str) -> Result<TagName> {
        check_name("name", name)?;
        check_name("tag", tag)?;
        if is_digest_prefix(name) {
            return Err(Error::usage(format!(
                "invalid name '{name}': could be mistaken for a digest prefix"
            ))
            .hint("add a '-' or a letter other than a to f to the name"));
        }
        Ok(TagName { name: name.to_owned(), tag: tag.to_owned() })
    }

    /// Returns the part before the colon.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the part after the colon.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl fmt::Display for TagName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}:{}", self.name, self.tag))
    }
}

impl Serialize for TagName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for TagName {
    type Err = Error;

    /// Parses `NAME` or `NAME:TAG`.
    fn from_str(text: &str) -> Result<TagName> {
        match text.split_once(':') {
            Some((name, tag)) => TagName::new(name, tag),
            None => TagName::new(text, DEFAULT_TAG),
        }
    }
}

/// Returns true if `text` is the beginning of a digest, or a whole digest.
pub(in crate::store) fn is_digest_prefix(text: &str) -> bool {
    (MIN_PREFIX..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_names() {
        for good in ["a", "debian-12", "x_y.z", "7zip", "memory", "_x", &"n".repeat(128)] {
            assert!(check_name("name", good).is_ok(), "{good}");
        }
        for bad in
            ["", ".", "..", "a..b", "a/b", "/a", "-a", ".a", "a b", "a\0", "ä", "a:b", &"n".repeat(129)]
        {
            assert!(check_name("name", bad).is_err(), "{bad}");
        }
    }
}
