//! `stencil density --by`: subtotals of groups of clones.

use std::io::{self, Write};

use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::clones::accounting::{Group, Parts};
use crate::units::Bytes;

/// Prints a row for each group, and their sum.
///
/// # Errors
/// Returns an error if writing to `out` fails.
pub fn print(groups: &[Group], out: &mut dyn Write) -> io::Result<()> {
    let mut sum = Parts::default();
    groups.iter().for_each(|group| sum += group.parts);
    // Disks in RAM are rare.
    let disks = sum.disk_bytes > Bytes::ZERO;
    let mut head = vec![
        Text("GROUP"),
        Number("CLONES"),
        Number("TEMPLATES"),
        Number("STORE"),
        Number("COPIED"),
        Number("TABLES"),
        Number("MONITOR"),
    ];
    head.extend(disks.then_some(Number("DISKS")));
    head.push(Number("TOTAL"));
    let mut table = Columns::new(&head);
    let mut row = |name: String, clones: u64, parts: &Parts| {
        let mut cells = vec![name, clones.to_string()];
        cells.extend(
            [
                parts.template_bytes,
                parts.store_cache_bytes,
                parts.private_bytes,
                parts.page_table_bytes,
                parts.overhead_bytes,
            ]
            .map(|bytes| bytes.to_string()),
        );
        cells.extend(disks.then(|| parts.disk_bytes.to_string()));
        cells.push(parts.host_bytes().to_string());
        table.row(cells);
    };
    groups.iter().for_each(|group| row(name(group), group.clones, &group.parts));
    row("(all)".to_owned(), groups.iter().map(|group| group.clones).sum(), &sum);
    table.print(out)?;
    writeln!(out, "\nmemory that clones share is split between them in equal parts")
}

fn name(group: &Group) -> String {
    if !group.tags.is_empty() {
        return group.tags.iter().cloned().collect::<Vec<_>>().join(", ");
    }
    match group.name.as_deref() {
        None => "(no clone)".to_owned(),
        Some("") => "(no label)".to_owned(),
        Some(name) => name.to_owned(),
    }
}
