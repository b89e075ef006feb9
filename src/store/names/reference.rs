//! References to templates.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::store::Digest;
use crate::store::format::name::{TagName, check_name, is_digest_prefix};

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
                    .hint("use NAME@blake3:HEX"));
            };
            return hex.to_ascii_lowercase().parse().map(TemplateRef::Digest);
        }
        let hex = text.strip_prefix("blake3:").unwrap_or(text);
        if is_digest_prefix(hex) {
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

#[cfg(test)]
mod tests {
    use crate::store::names::reference::*;

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
