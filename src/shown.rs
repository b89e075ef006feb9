//! Text that somebody else wrote, as it may stand on a terminal.

use std::borrow::Cow;

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
    fn json_stays_the_same_json() {
        let value = serde_json::json!({"a": "x\u{202e}\u{9b}\u{e0041}\u{1b}\n\\", "b": ["\u{200f}"]});
        let text = shown_lines(&format!("{value:#}"));
        assert!(!text.replace('\n', "").contains(is_unprintable), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
