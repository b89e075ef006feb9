//! Keys of the screen.

/// A key that the screen knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    /// Ctrl-C.
    Interrupt,
}

impl Key {
    /// Returns the keys in the bytes of one read. A terminal writes the bytes of a key at once, so a last escape
    /// character is the key Esc. Keys without a meaning are left out.
    pub fn parse(bytes: &[u8]) -> Vec<Key> {
        let (text, mut keys) = (String::from_utf8_lossy(bytes), Vec::new());
        let mut rest = text.chars().peekable();
        while let Some(char) = rest.next() {
            let key = match char {
                '\x1b' if rest.next_if(|char| matches!(char, '[' | 'O')).is_some() => {
                    let parameters: String =
                        std::iter::from_fn(|| rest.next_if(char::is_ascii_digit)).collect();
                    match (parameters.as_str(), rest.next()) {
                        ("", Some('A')) => Key::Up,
                        ("", Some('B')) => Key::Down,
                        ("", Some('H')) | ("1" | "7", Some('~')) => Key::Home,
                        ("", Some('F')) | ("4" | "8", Some('~')) => Key::End,
                        ("5", Some('~')) => Key::PageUp,
                        ("6", Some('~')) => Key::PageDown,
                        _ => continue,
                    }
                }
                '\x1b' => Key::Escape,
                '\r' | '\n' => Key::Enter,
                '\x7f' | '\x08' => Key::Backspace,
                '\x03' => Key::Interrupt,
                char if char.is_control() || char == char::REPLACEMENT_CHARACTER => continue,
                char => Key::Char(char),
            };
            keys.push(key);
        }
        keys
    }
}

/// What the keys do, for the help.
pub const HELP: [(&str, &str); 12] = [
    ("Up, Down, PgUp, PgDn, Home, End", "select a clone"),
    ("/", "filter: template, tag, label, id, process id, command; Enter keeps it, Esc removes it"),
    ("s", "sort by the next figure"),
    ("c", "sort by copied pages"),
    ("r", "sort by copied pages per second"),
    ("m", "sort by clean template pages that are mapped"),
    ("t", "sort by page tables"),
    ("o", "sort by overhead: memory outside the template"),
    ("n", "sort by the name of the clone"),
    ("p", "sort by process id"),
    ("?", "this help"),
    ("q, Esc, Ctrl-C", "quit"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_common_terminals() {
        for (bytes, key) in [
            ("\x1b[A", Key::Up),
            ("\x1bOB", Key::Down),
            ("\x1b[5~", Key::PageUp),
            ("\x1b[6~", Key::PageDown),
            ("\x1b[1~", Key::Home),
            ("\x1bOF", Key::End),
            ("\x1b", Key::Escape),
            ("\r", Key::Enter),
            ("\x7f", Key::Backspace),
            ("\x03", Key::Interrupt),
            ("ä", Key::Char('ä')),
        ] {
            assert_eq!(Key::parse(bytes.as_bytes()), [key], "{bytes:?}");
        }
    }

    #[test]
    fn one_read_may_have_several_keys_and_unknown_ones() {
        use Key::{Char, Down, Escape};
        assert_eq!(Key::parse(b"?\x1b"), [Char('?'), Escape]);
        assert_eq!(Key::parse(b"a\x1b[B\x1b[24~\x1b[Cb\x01\xff"), [Char('a'), Down, Char('b')]);
        assert_eq!(Key::parse(b"\x1b["), []);
        assert_eq!(Key::parse(b""), []);
    }
}
