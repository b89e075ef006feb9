//! Tables for a terminal or a file: at most 100 columns wide, numbers aligned to the right.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, presets};

use crate::sanitize::sanitize;

/// Maximum width of a table. Cells of text are wrapped; the names of a template may have 257 characters.
const MAX_WIDTH: u16 = 100;

/// A column and its heading.
#[derive(Debug, Clone, Copy)]
pub enum Column {
    /// Aligned to the left, wrapped if the table is too wide.
    Text(&'static str),
    /// Aligned to the right, never wrapped.
    Number(&'static str),
}

/// A table that is built row by row.
pub struct Columns(Table);

impl Columns {
    /// Creates a table with these columns.
    pub fn new(columns: &[Column]) -> Columns {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(MAX_WIDTH);
        table.set_header(columns.iter().map(|(Column::Text(heading) | Column::Number(heading))| *heading));
        for (column, style) in columns.iter().zip(table.column_iter_mut()) {
            style.set_padding((0, 2));
            if let Column::Number(_) = column {
                style.set_cell_alignment(CellAlignment::Right);
                style.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
        Columns(table)
    }

    /// Adds a row. Each cell is sanitized for a terminal.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells.into_iter().map(|cell| sanitize(&cell).into_owned()));
    }

    /// Writes the table with two spaces between columns and no trailing spaces.
    ///
    /// # Errors
    /// Returns an error if writing to `out` fails.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        self.0.lines().try_for_each(|line| writeln!(out, "{}", line.trim_end()))
    }
}

#[cfg(test)]
mod tests {
    use super::Column::{Number, Text};
    use super::*;

    fn printed(table: &Columns) -> String {
        let mut out = Vec::new();
        table.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn alignment_depends_on_the_column_and_not_on_its_cells() {
        let mut table = Columns::new(&[Text("NAME"), Number("N"), Text("LAST")]);
        table.row(["1".into(), "-".into(), "2".into()]);
        table.row(["long-1".into(), "100".into(), "x y".into()]);
        assert_eq!(printed(&table), "NAME      N  LAST\n1         -  2\nlong-1  100  x y\n");
    }

    #[test]
    fn wraps_text_and_never_numbers() {
        let (long, size) = ("x".repeat(257), "1023 MiB".to_owned());
        let mut table = Columns::new(&[Text("A"), Number("SIZE"), Text("B"), Text("DIGEST")]);
        table.row([long.clone(), size.clone(), "a,".repeat(150), "8f477ddc11d6".into()]);
        let text = printed(&table);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert_eq!(text.matches('x').count(), long.len(), "{text}");
        assert!(text.contains(&size) && text.contains("8f477ddc11d6"), "{text}");
    }
}
