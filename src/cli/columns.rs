//! Tables for a terminal: each column as wide as its widest cell, numbers aligned to the right.

use std::io::{self, Write};

use crate::sanitize::sanitize;

/// A table that is built row by row.
pub struct Columns {
    rows: Vec<Vec<String>>,
}

impl Columns {
    /// Creates a table with these column headings.
    pub fn new(head: &[&str]) -> Columns {
        Columns { rows: vec![head.iter().map(|h| h.to_string()).collect()] }
    }

    /// Adds a row. Each cell is sanitized for a terminal.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| sanitize(&cell).into_owned()).collect());
    }

    /// Writes the table with two spaces between columns and no trailing spaces.
    ///
    /// # Errors
    /// Returns an error if writing to `out` fails.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let count = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..count).map(width).collect();
        let number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit());
        let is_numeric = |column: usize| {
            let body = self.rows.get(1..).unwrap_or_default();
            !body.is_empty() && body.iter().all(|row| row.get(column).is_none_or(number))
        };
        let numeric: Vec<bool> = (0..count).map(is_numeric).collect();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(widths.iter().zip(&numeric))
                .map(
                    |(cell, (width, right))| {
                        if *right { format!("{cell:>width$}") } else { format!("{cell:width$}") }
                    },
                )
                .collect();
            writeln!(out, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_text_left_and_numbers_right() {
        let mut out = Vec::new();
        let mut table = Columns::new(&["NAME", "N"]);
        table.row(["a".into(), "1".into()]);
        table.row(["long".into(), "100".into()]);
        table.print(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "NAME    N\na       1\nlong  100\n");
    }
}
