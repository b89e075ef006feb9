//! Value parsers of the command line, with the remedy in the error message.

use std::str::FromStr;

use crate::error::Error;

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
    crate::control::parse_seconds(text).map_err(explain)
}

/// Default number of seconds after which a stalled stream is an error.
pub const STALL: &str = "300";

fn explain(error: Error) -> String {
    match error.hint_text() {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}
