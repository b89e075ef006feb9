//! Tables for people: columns as wide as their widest cell.

use std::io::{self, Write};

/// A table that is built row by row.
pub struct Columns {
    rows: Vec<Vec<String>>,
}

impl Columns {
    /// A table with this head.
    pub fn new(head: &[&str]) -> Columns {
        Columns { rows: vec![head.iter().map(|h| h.to_string()).collect()] }
    }

    /// The next row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Writes it, two spaces between columns and none at the end of a line.
    ///
    /// # Errors
    /// Whatever writing to `out` gives.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let count = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..count).map(width).collect();
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(out, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}
