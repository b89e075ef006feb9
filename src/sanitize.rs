//! Sanitizes foreign text for a terminal, and formats paths and times.

use std::borrow::Cow;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serializer;

/// Writes a line to standard error. Write errors are ignored: a closed standard error must not fail the command.
#[macro_export]
macro_rules! print_line {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// Replaces every character that moves the cursor, is invisible or reverses the text direction by its JSON escape:
/// `\u001b`, four hexadecimal digits per UTF-16 unit. The result is one line. Valid JSON keeps its value.
pub fn sanitize(text: &str) -> Cow<'_, str> {
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

/// Same as [`sanitize`], but keeps line breaks.
pub fn sanitize_lines(text: &str) -> String {
    text.split('\n').map(sanitize).collect::<Vec<_>>().join("\n")
}

/// Returns a path as text; bytes that are not UTF-8 become `\xHH`. The result is for display and cannot be opened.
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

/// Formats seconds since 1970-01-01 UTC as RFC 3339; after the year 9999 as a number, in the form of date(1).
#[cfg(feature = "internals")]
pub fn utc(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| format!("@{seconds}"), |time| time.to_string())
}

/// Serializes a path as text, for `#[serde(serialize_with = "…")]`: serde itself rejects a path that is not UTF-8.
///
/// # Errors
/// Returns the error of the serializer.
pub fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path_text(path))
}

/// Same as [`path()`] for an optional path.
///
/// # Errors
/// Returns the error of the serializer.
pub fn optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&*path_text(path)),
        None => serializer.serialize_none(),
    }
}

/// Returns true for control characters and invisible characters: direction marks, joiners, separators and tags.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use crate::sanitize::*;

    #[test]
    fn escapes_controls_and_direction_marks() {
        assert_eq!(sanitize("a\u{1b}[31m\r\n\u{9b}\u{7f}b"), r"a\u001b[31m\u000d\n\u009b\u007fb");
        assert_eq!(sanitize("\u{202e}cod\u{2066}\u{e0041}"), r"\u202ecod\u2066\udb40\udc41");
        assert!(matches!(sanitize("größe 你好 \\ \"x\" e\u{301}"), Cow::Borrowed(_)));
        assert_eq!(sanitize_lines("{\n  \u{202e}}\n"), "{\n  \\u202e}\n");
    }

    #[test]
    #[cfg(feature = "internals")]
    fn formats_times_as_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_207_200, "9999-12-30T22:00:00Z"),
            (1 << 62, "@4611686018427387904"),
            (u64::MAX, "@18446744073709551615"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn path_text_escapes_invalid_utf8() {
        use std::ffi::OsStr;
        assert!(matches!(path_text(Path::new("/größe/a")), Cow::Borrowed("/größe/a")));
        assert_eq!(path_text(Path::new(OsStr::from_bytes(b"/a\xff\xc3/\xe4b"))), r"/a\xff\xc3/\xe4b");
    }

    #[test]
    fn escaping_keeps_json_values() {
        let value = serde_json::json!({"a": "x\u{202e}\u{9b}\u{e0041}\u{1b}\n\\", "b": ["\u{200f}"]});
        let text = sanitize_lines(&format!("{value:#}"));
        assert!(!text.replace('\n', "").contains(is_unprintable), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
