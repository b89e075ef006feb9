//! Names of templates, tags and files, and references to templates.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::store::Digest;

/// Tag of a reference without a tag.
pub const DEFAULT_TAG: &str = "latest";

/// Maximum length of a name or tag in bytes.
pub const MAX_NAME: usize = 128;

/// Minimum number of hex digits in a digest prefix.
pub const MIN_PREFIX: usize = 8;

/// Checks a name that is used as a file name: letters, digits, `.`, `_` and `-`, starting with a letter, a digit or
/// `_`, without `..`, at most `MAX_NAME` bytes.
///
/// # Errors
/// Returns a usage error with the rule that `text` violates; `what` names the kind of name in the message.
pub fn check_name(what: &str, text: &str) -> Result<()> {
    let invalid = |why: &str| {
        Err(Error::usage(format!("invalid {what} '{}': {why}", text.escape_debug())).remedy(format!(
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
        if is_prefix(name) {
            return Err(Error::usage(format!(
                "invalid name '{name}': could be mistaken for a digest prefix"
            ))
            .remedy("add a '-' or a letter other than a to f to the name"));
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

/// A user's reference to a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateRef {
    /// `NAME` or `NAME:TAG`.
    Tag(TagName),
    /// `NAME@blake3:HEX` (the name is ignored), or all 64 hex digits of a digest.
    Digest(Digest),
    /// The first eight or more hex digits of a digest, in lower case.
    Prefix(String),
}

impl FromStr for TemplateRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<TemplateRef> {
        if let Some((name, digest)) = text.split_once('@') {
            check_name("name", name)?;
            let Some(hex) = digest.strip_prefix("blake3:") else {
                return Err(Error::usage(format!("invalid reference '{text}': unsupported hash"))
                    .remedy("use NAME@blake3:HEX"));
            };
            return hex.to_ascii_lowercase().parse().map(TemplateRef::Digest);
        }
        let hex = text.strip_prefix("blake3:").unwrap_or(text);
        if is_prefix(hex) {
            let hex = hex.to_ascii_lowercase();
            return Ok(match hex.len() {
                64 => TemplateRef::Digest(hex.parse()?),
                _ => TemplateRef::Prefix(hex),
            });
        }
        text.parse().map(TemplateRef::Tag)
    }
}

impl fmt::Display for TemplateRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TemplateRef::Tag(tag) => tag.fmt(f),
            TemplateRef::Digest(digest) => digest.fmt(f),
            TemplateRef::Prefix(prefix) => prefix.fmt(f),
        }
    }
}

fn is_prefix(text: &str) -> bool {
    (MIN_PREFIX..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use crate::store::names::reference::*;

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

    #[test]
    fn parses_references() {
        let hex = Digest::of(b"x").to_string();
        let tag = |n: &str, t: &str| TemplateRef::Tag(TagName::new(n, t).unwrap());
        assert_eq!("a".parse::<TemplateRef>().unwrap(), tag("a", "latest"));
        assert_eq!("a:b".parse::<TemplateRef>().unwrap(), tag("a", "b"));
        assert_eq!("abc123".parse::<TemplateRef>().unwrap(), tag("abc123", "latest"));
        assert_eq!(hex[..8].parse::<TemplateRef>().unwrap(), TemplateRef::Prefix(hex[..8].into()));
        for whole in
            [hex.clone(), format!("a@blake3:{hex}"), format!("blake3:{hex}"), hex.to_ascii_uppercase()]
        {
            assert_eq!(whole.parse::<TemplateRef>().unwrap(), TemplateRef::Digest(Digest::of(b"x")));
        }
        for bad in ["", "a:", ":b", "a:b:c", "../x", "a/b", "a@sha256:00", "a@blake3:12", "deadbeef:1"] {
            assert!(bad.parse::<TemplateRef>().is_err(), "{bad}");
        }
    }
}
