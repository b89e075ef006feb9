//! Syntax of QEMU option strings: `key=value,key=value`, sizes, numbers, identifiers.

use crate::error::{Error, Result};

/// One `key=value` of an option string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Text before the `=`.
    pub key: String,
    /// Text after the `=`, with `,,` decoded as one comma.
    pub value: String,
    /// The name as written, if the option has no value (`share`, `noshare`).
    pub short: Option<String>,
}

/// Splits an option string. A first word without `=` is the value of the key `first`. Any later word without `=` is a
/// flag: `share` means `share=on`, `noshare` means `share=off`.
pub fn pairs(text: &str, first: &str) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let mut rest = text;
    let mut implied = Some(first);
    while !rest.is_empty() {
        let name_end = rest.find(['=', ',']).unwrap_or(rest.len());
        let implied_key = implied.take();
        let pair = if rest[name_end..].starts_with('=') {
            let (value, used) = value(&rest[name_end + 1..]);
            let key = rest[..name_end].to_owned();
            rest = &rest[name_end + 1 + used..];
            Pair { key, value, short: None }
        } else if let Some(key) = implied_key {
            let (value, used) = value(rest);
            rest = &rest[used..];
            Pair { key: key.to_owned(), value, short: None }
        } else {
            let name = &rest[..name_end];
            rest = &rest[name_end..];
            let (key, value) = name.strip_prefix("no").map_or((name, "on"), |key| (key, "off"));
            Pair { key: key.to_owned(), value: value.to_owned(), short: Some(name.to_owned()) }
        };
        pairs.push(pair);
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    pairs
}

/// Returns the value at the start of `text`, which ends at a comma that is not doubled, and the number of bytes that it
/// takes in `text`. `,,` stands for one comma.
fn value(text: &str) -> (String, usize) {
    let mut value = String::new();
    let mut at = 0;
    loop {
        let end = text[at..].find(',').map_or(text.len(), |n| at + n);
        value.push_str(&text[at..end]);
        if !text[end..].starts_with(",,") {
            return (value, end);
        }
        value.push(',');
        at = end + 2;
    }
}

/// Returns true if the text has only letters, digits, `-`, `.` and `_`, and starts with a letter.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// Returns QEMU's error for a value of the wrong kind.
pub fn expects(name: &str, what: &str) -> Error {
    Error::usage(format!("Parameter '{name}' expects {what}"))
}

/// Parses the number at the start of `text` like `strtoull` of C, and returns the number and the rest. Spaces and a `+`
/// may precede the number; with `base` 0 also `0x…` and octal `0…` are accepted. Returns `None` without a number, for a
/// negative number and on overflow.
fn leading_number(text: &str, base: u32) -> Option<(u64, &str)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let text = text.strip_prefix('+').unwrap_or(text);
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (base, digits) = match (base, hex) {
        (0 | 16, Some(digits)) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, digits),
        (0, _) if text.starts_with('0') => (8, text),
        (0, _) => (10, text),
        (base, _) => (base, text),
    };
    let end = digits.find(|c: char| !c.is_digit(base)).unwrap_or(digits.len());
    let number = u64::from_str_radix(&digits[..end], base).ok()?;
    Some((number, &digits[end..]))
}

/// Parses an unsigned integer.
///
/// # Errors
/// Returns `Parameter 'NAME' expects a uint64 value`.
pub fn number(name: &str, text: &str) -> Result<u64> {
    match leading_number(text, 0) {
        Some((number, "")) => Ok(number),
        _ => Err(expects(name, "a uint64 value")),
    }
}

/// Maximum number of members of a range `a-b`.
const RANGE_MAX: u64 = 65536;

/// Parses an unsigned integer or an inclusive range `a-b`.
///
/// # Errors
/// Returns `Parameter 'NAME' expects a uint64 value or range`.
pub fn number_or_range(name: &str, text: &str) -> Result<std::ops::RangeInclusive<u64>> {
    let bad = || expects(name, "a uint64 value or range");
    let (first, rest) = leading_number(text, 0).ok_or_else(bad)?;
    if rest.is_empty() {
        return Ok(first..=first);
    }
    let last = rest.strip_prefix('-').and_then(|last| leading_number(last, 0));
    match last {
        Some((last, "")) if first <= last && last - first < RANGE_MAX => Ok(first..=last),
        _ => Err(bad()),
    }
}

/// Parses a size in bytes: an integer or decimal fraction with an optional unit `B K M G T P E`, or `0x…` without a
/// unit.
///
/// # Errors
/// Returns `Parameter 'NAME' expects a size value`.
pub fn size(name: &str, text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| expects(name, "a size value"))
}

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let text = text.strip_prefix('+').unwrap_or(text);
    if text.starts_with("0x") || text.starts_with("0X") {
        return leading_number(text, 16).filter(|(_, rest)| rest.is_empty()).map(|(number, _)| number);
    }
    let (whole, rest) = split_digits(text);
    let (fraction, unit) = match rest.strip_prefix('.') {
        Some(rest) => split_digits(rest),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let shift = match unit {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return None,
    };
    // The fraction in units of 2^-64, with the precision of a double, as in QEMU.
    let part = format!("0.{fraction}0").parse::<f64>().ok()? * 2f64.powi(64);
    if part > 0.0 && shift == 0 {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to 2^64, truncated as in QEMU"
    )]
    let part = part as u128;
    let fixed = ((u128::from(whole) << 64) + part).checked_mul(1 << shift)?;
    let rounded = fixed.checked_add(1 << 63)? >> 64;
    u64::try_from(rounded).ok()
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Vec<(String, String)> {
        pairs(text, "qom-type").into_iter().map(|p| (p.key, p.value)).collect()
    }

    fn list(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn splits_option_strings_like_qemu() {
        let table: &[(&str, &[(&str, &str)])] = &[
            ("", &[]),
            ("t", &[("qom-type", "t")]),
            ("t,a=1", &[("qom-type", "t"), ("a", "1")]),
            ("a=1,b=2", &[("a", "1"), ("b", "2")]),
            ("t,a=x,,y,b=", &[("qom-type", "t"), ("a", "x,y"), ("b", "")]),
            ("t,a=,,,b=1", &[("qom-type", "t"), ("a", ","), ("b", "1")]),
            ("t,a=1,", &[("qom-type", "t"), ("a", "1")]),
            ("t,a=1,,", &[("qom-type", "t"), ("a", "1,")]),
            ("t,,u,a=1", &[("qom-type", "t,u"), ("a", "1")]),
            (",a=1", &[("qom-type", ""), ("a", "1")]),
            (
                "t,share,noreadonly,no",
                &[("qom-type", "t"), ("share", "on"), ("readonly", "off"), ("", "off")],
            ),
            ("t,=3,a=b=c", &[("qom-type", "t"), ("", "3"), ("a", "b=c")]),
            ("t,é=ü,,ö", &[("qom-type", "t"), ("é", "ü,ö")]),
        ];
        for (text, expected) in table {
            assert_eq!(plain(text), list(expected), "{text}");
        }
    }

    #[test]
    fn flag_keeps_its_written_name() {
        let pairs = pairs("t,noshare", "qom-type");
        assert_eq!(
            pairs[1],
            Pair { key: "share".into(), value: "off".into(), short: Some("noshare".into()) }
        );
    }

    #[test]
    fn parses_sizes_like_qemu() {
        for (text, bytes) in [
            ("4096", 4096),
            (" +4096", 4096),
            ("4096B", 4096),
            ("4k", 4096),
            ("0x1000", 4096),
            ("0.5M", 1 << 19),
            (".5M", 1 << 19),
            ("1.M", 1 << 20),
            ("1.0", 1),
            ("1.5G", 3 << 29),
            ("15E", 15 << 60),
            ("0.0001k", 0),
            ("0.0005k", 1),
            ("007", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(size("size", text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            " ",
            ".",
            "k",
            "-1",
            "1.5",
            "1.5B",
            "1e3",
            "4KiB",
            "4KB",
            "0x",
            "0x10k",
            "0x1.8",
            "16E",
            "on",
            "18446744073709551616",
            "99999999999999999999999999999999999999G",
            "1 k",
            "１",
        ] {
            let error = size("size", text).unwrap_err();
            assert_eq!(error.message(), "Parameter 'size' expects a size value", "{text}");
        }
    }

    #[test]
    fn parses_numbers_and_ranges() {
        for (text, value) in [("3", 3), ("0x10", 16), ("010", 8), (" +3", 3), ("0", 0)] {
            assert_eq!(number("n", text).unwrap(), value, "{text}");
        }
        for text in ["", "x", "-1", "1k", "08", "0x", "3-4", "18446744073709551616"] {
            assert!(number("n", text).is_err(), "{text}");
        }
        assert_eq!(number_or_range("n", "2-5").unwrap(), 2..=5);
        assert_eq!(number_or_range("n", "7").unwrap(), 7..=7);
        for text in ["", "1-0", "1-", "-1", "x", "0-65536", "1-2-3"] {
            assert!(number_or_range("n", text).is_err(), "{text}");
        }
    }

    #[test]
    fn checks_identifiers() {
        for text in ["m", "M1", "a-b.c_d"] {
            assert!(is_identifier(text), "{text}");
        }
        for text in ["", "1m", "_m", "m/", "m,", "ä", "mä"] {
            assert!(!is_identifier(text), "{text}");
        }
    }
}
