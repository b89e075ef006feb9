//! The configuration of a VMM as text.

use std::path::PathBuf;

/// The configuration of a VMM, for the user to paste.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmArguments {
    /// The configuration as text.
    pub text: String,
    /// For QEMU and Cloud Hypervisor: the command line as separate words, beginning with the program.
    pub argv: Option<Vec<String>>,
    /// For Firecracker: the request body as a JSON value.
    pub body: Option<serde_json::Value>,
    /// For Cloud Hypervisor: files of one clone, with their contents.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Quotes a word for a POSIX shell.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_words_for_a_shell() {
        assert_eq!(shell_word("-m"), "-m");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
