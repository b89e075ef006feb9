//! `stencil density --wide`: every column of templates and clones, and all sums.

use std::io::{self, Write};

use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::clones::accounting::{CloneMemory, CloneRow, Density, TemplateMemory, Totals};
use crate::clones::counted;
use crate::units::Bytes;

/// Prints the tables and the sums.
///
/// # Errors
/// Returns an error if writing to `out` fails.
pub fn print(density: &Density, out: &mut dyn Write) -> io::Result<()> {
    templates(&density.templates, out)?;
    clones(&density.clones, out)?;
    totals(&density.totals, out)
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |v| format!("{v:.2}"))
}

fn templates(templates: &[TemplateMemory], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Columns::new(&[
        Text("TEMPLATE"),
        Text("SERVING"),
        Number("SIZE"),
        Number("DATA"),
        Number("RESIDENT"),
        Number("CLONES"),
        Text("TAGS"),
    ]);
    for t in templates {
        table.row([
            t.digest.short(),
            t.serving.clone(),
            t.size_bytes.to_string(),
            t.data_bytes.to_string(),
            t.resident_bytes.to_string(),
            t.clones.to_string(),
            if t.tags.is_empty() {
                "-".to_owned()
            } else {
                t.tags.iter().cloned().collect::<Vec<_>>().join(", ")
            },
        ]);
    }
    table.print(out)?;
    writeln!(out)
}

fn clones(clones: &[CloneRow], out: &mut dyn Write) -> io::Result<()> {
    // Swap and disks are rare. Without their columns, the table fits 100 columns.
    let any = |part: fn(&CloneMemory) -> Bytes| clones.iter().any(|clone| part(&clone.memory) > Bytes::ZERO);
    let (swap, disk) = (any(|m| m.swap_bytes), any(|m| m.disk_bytes));
    let mut head = vec![
        Text("CLONE"),
        Number("PID"),
        Text("KIND"),
        Number("MAPPED"),
        Number("CLEAN"),
        Number("DIRTY"),
        Number("PRIVATE"),
    ];
    head.extend(swap.then_some(Number("SWAP")));
    head.extend([Number("TABLES"), Number("OVERHEAD")]);
    head.extend(disk.then_some(Number("DISK")));
    head.push(Text("NAME"));
    let mut table = Columns::new(&head);
    for c in clones {
        let m = &c.memory;
        let mut row = vec![
            c.id.clone(),
            c.pid.to_string(),
            c.kind.clone(),
            m.mapped_bytes.to_string(),
            m.mapped_clean_bytes.to_string(),
            m.dirty_pages.get().to_string(),
            m.private_bytes.to_string(),
        ];
        row.extend(swap.then(|| m.swap_bytes.to_string()));
        row.extend([m.page_table_bytes.to_string(), m.overhead_bytes.to_string()]);
        row.extend(disk.then(|| m.disk_bytes.to_string()));
        row.push(c.reference.as_ref().unwrap_or(&c.command).clone());
        table.row(row);
    }
    table.print(out)?;
    writeln!(out)
}

fn totals(t: &Totals, out: &mut dyn Write) -> io::Result<()> {
    let part = |out: &mut dyn Write, name: &str, bytes: Bytes| writeln!(out, "  {name:<22}{bytes:>10}");
    writeln!(out, "memory of {}", counted(t.clones, "clone", "clones"))?;
    part(out, "template pages", t.template_bytes)?;
    part(out, "store cache", t.store_cache_bytes)?;
    part(out, "private pages", t.private_bytes)?;
    part(out, "page tables", t.page_table_bytes)?;
    part(out, "overhead", t.overhead_bytes)?;
    part(out, "disks in RAM", t.disk_bytes)?;
    part(out, "= host memory", t.host_bytes)?;
    if let (Some(bytes), Some(count)) = (t.bytes_per_further_clone, t.clones_per_gib) {
        writeln!(out, "each further clone takes {bytes}; {count:.1} more fit into 1 GiB")?;
        writeln!(
            out,
            "sharing ratio {} (if each clone had its own copy of the template's data: {})",
            ratio(t.sharing_ratio),
            t.copied_bytes
        )?;
        writeln!(
            out,
            "lazy ratio {} (if each clone had its own copy of the pages that it touched)",
            ratio(t.lazy_ratio)
        )?;
        writeln!(out, "overcommit ratio {} (mapped: {})", ratio(t.overcommit_ratio), t.mapped_bytes)?;
    }
    Ok(())
}
