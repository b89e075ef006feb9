//! Text that somebody else wrote, as it may stand on a terminal.

use std::borrow::Cow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serializer;

/// Writes a line to standard error. A standard error that takes no bytes is no reason to fail.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// The text with every character that moves, hides or reverses what stands around it written as JSON does: `\u001b`, four
/// hexadecimal digits for each unit of UTF-16. One line stays one line, and what was JSON is the same JSON.
pub fn shown(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if is_unprintable(c) => {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
            c => out.push(c),
        }
    }
    out.into()
}

/// As [`shown`], but lines stay lines.
pub fn shown_lines(text: &str) -> String {
    text.split('\n').map(shown).collect::<Vec<_>>().join("\n")
}

/// A path as text: bytes that are not UTF-8 become `\xHH`. The result names the path to a person; it does not open it.
pub fn path_text(path: &Path) -> Cow<'_, str> {
    let bytes = path.as_os_str().as_bytes();
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.into();
    }
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out.into()
}

/// A time as RFC 3339 in UTC, from seconds since 1970.
pub fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of year 0, in eras of 400 years: the leap day is the last of its year.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// For `#[serde(serialize_with = "…")]` of a [`PathBuf`] in a report: serde fails for a path that is not UTF-8.
///
/// # Errors
/// The serializer's.
pub fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path_text(path))
}

/// As [`path`], for an optional one.
///
/// # Errors
/// The serializer's.
pub fn optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&*path_text(path)),
        None => serializer.serialize_none(),
    }
}

/// Control characters, and those that are not seen: marks of direction, joiners, separators, tags.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_turns_the_text_round() {
        assert_eq!(shown("a\u{1b}[31m\r\n\u{9b}\u{7f}b"), r"a\u001b[31m\u000d\n\u009b\u007fb");
        assert_eq!(shown("\u{202e}cod\u{2066}\u{e0041}"), r"\u202ecod\u2066\udb40\udc41");
        assert!(matches!(shown("größe 你好 \\ \"x\" e\u{301}"), Cow::Borrowed(_)));
        assert_eq!(shown_lines("{\n  \u{202e}}\n"), "{\n  \\u202e}\n");
    }

    #[test]
    fn times_are_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn a_path_of_any_bytes_is_text() {
        use std::ffi::OsStr;
        assert!(matches!(path_text(Path::new("/größe/a")), Cow::Borrowed("/größe/a")));
        assert_eq!(path_text(Path::new(OsStr::from_bytes(b"/a\xff\xc3/\xe4b"))), r"/a\xff\xc3/\xe4b");
    }

    #[test]
    fn json_stays_the_same_json() {
        let value = serde_json::json!({"a": "x\u{202e}\u{9b}\u{e0041}\u{1b}\n\\", "b": ["\u{200f}"]});
        let text = shown_lines(&format!("{value:#}"));
        assert!(!text.replace('\n', "").contains(is_unprintable), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
