//! Standard output.

use std::io::Write;

/// Prints a line to standard output; a closed pipe is ignored.
pub fn print_line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
