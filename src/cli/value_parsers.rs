//! Value parsers of the command line, with the remedy in the error message.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::error::Error;

/// Longest time of an option, 136 years. Longer times have the same effect, and the sum with an `Instant` may overflow.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(1 << 32);

/// Parses a value, for `#[arg(value_parser = word::<T>)]`.
///
/// # Errors
/// Returns the message and the remedy of `T`'s own error.
pub fn word<T: FromStr<Err = Error>>(text: &str) -> Result<T, String> {
    text.parse().map_err(explain)
}

/// Parses permission bits in octal.
///
/// # Errors
/// Same as [`word`].
pub fn mode(text: &str) -> Result<u32, String> {
    crate::store::parse_mode(text).map_err(explain)
}

/// Parses a size in bytes, or with a unit.
///
/// # Errors
/// Same as [`word`].
pub fn size(text: &str) -> Result<crate::units::Bytes, String> {
    crate::units::Bytes::parse(text).map_err(explain)
}

/// Parses a size of the kernel's read-ahead.
///
/// # Errors
/// Same as [`word`].
pub fn read_ahead(text: &str) -> Result<crate::units::Bytes, String> {
    crate::control::parse_read_ahead(text).map_err(explain)
}

/// Parses a time in seconds.
///
/// # Errors
/// Same as [`word`].
pub fn seconds(text: &str) -> Result<std::time::Duration, String> {
    crate::control::parse_seconds(text).map(|time| time.min(LONGEST)).map_err(explain)
}

/// A label of a template or a clone.
#[derive(Debug, Clone)]
pub struct Label(String, String);

impl Label {
    /// Returns the values by their keys. Of several values for a key, the last one counts.
    pub fn map(labels: &[Label]) -> BTreeMap<String, String> {
        labels.iter().map(|Label(key, value)| (key.clone(), value.clone())).collect()
    }
}

impl FromStr for Label {
    type Err = Error;

    fn from_str(text: &str) -> Result<Label, Error> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Label(key.to_owned(), value.to_owned())),
            _ => Err(Error::usage(format!("invalid label '{text}': expected KEY=VALUE"))
                .hint("write --label KEY=VALUE")),
        }
    }
}

/// Default number of seconds after which a stalled stream is an error.
pub const STALL: &str = "300";

fn explain(error: Error) -> String {
    match error.hint_text() {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_any_time_can_be_computed() {
        for (text, expected) in [("1e19", LONGEST), ("1e9", std::time::Duration::from_secs(1_000_000_000))] {
            let time = seconds(text).unwrap();
            assert_eq!(time, expected);
            assert!(std::time::Instant::now().checked_add(time).is_some());
        }
    }
}
