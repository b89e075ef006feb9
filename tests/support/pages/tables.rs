//! Reads tables of the documentation, for tests that execute their rows.

use std::path::Path;

/// Returns the rows of the table below `<!-- test: NAME -->` in a file of `docs/`, without the heading.
pub fn rows(document: &str, name: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(document);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let marker = format!("<!-- test: {name} -->");
    let rows: Vec<_> = text
        .lines()
        .skip_while(|line| *line != marker)
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
        .collect();
    assert!(!rows.is_empty(), "{} has no table {marker}", path.display());
    rows
}

/// Returns the text between the backticks of a cell that consists of one code span.
pub fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}
