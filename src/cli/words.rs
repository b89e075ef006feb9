//! Words of the command line as values, with the remedy in the message.

use std::str::FromStr;

use crate::error::Error;

/// For `#[arg(value_parser = word::<T>)]`: an error says what is wrong and what to write instead.
///
/// # Errors
/// The message and the remedy of `T`'s own error.
pub fn word<T: FromStr<Err = Error>>(text: &str) -> Result<T, String> {
    text.parse().map_err(explain)
}

/// Permission bits in octal.
///
/// # Errors
/// As [`word`].
pub fn mode(text: &str) -> Result<u32, String> {
    crate::store::parse_mode(text).map_err(explain)
}

/// A size in bytes, or with a unit.
///
/// # Errors
/// As [`word`].
pub fn size(text: &str) -> Result<crate::units::Bytes, String> {
    crate::units::Bytes::parse(text).map_err(explain)
}

/// A time in seconds.
///
/// # Errors
/// As [`word`].
pub fn seconds(text: &str) -> Result<std::time::Duration, String> {
    crate::control::parse_seconds(text).map_err(explain)
}

/// How many seconds a sender may be silent, unless it is said otherwise.
pub const STALL: &str = "300";

fn explain(error: Error) -> String {
    match error.remedy_text() {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}
