//! `stencil density --audit`: the figures beside those of another method.

use std::io::{self, Write};

use crate::clones::audit::{Audit, Verdict};
use crate::clones::counted;

/// Prints the figures that the audit compares, and its verdicts.
///
/// # Errors
/// Returns an error if writing to `out` fails.
pub fn print(audit: &Audit, out: &mut dyn Write) -> io::Result<()> {
    let f = &audit.frames;
    writeln!(out, "\naudit by page frames          counted   accounted")?;
    for (name, counted, accounted) in [
        ("private pages", f.private_bytes, f.private_accounted),
        ("overhead", f.overhead_bytes, f.overhead_accounted),
        ("template pages", f.template_bytes, f.template_accounted),
        ("page tables", f.page_table_bytes, f.page_table_accounted),
    ] {
        writeln!(out, "  {name:<22}{counted:>10}  {accounted:>10}")?;
    }
    writeln!(out, "  {:<22}{:>10}  {:>10}", "clones", f.address_spaces, f.address_spaces_accounted)?;
    writeln!(
        out,
        "  {}, {}",
        counted(f.unknown_processes, "unknown process", "unknown processes"),
        counted(f.unexplained_mappings, "unexplained mapping", "unexplained mappings")
    )?;
    if f.changed_percent >= 0.01 {
        writeln!(out, "  the memory of the clones changed by {:.2} % during the audit", f.changed_percent)?;
    }
    let verdict = |of: Verdict, error: f64, tolerance: f64| {
        format!("{}: off by {error:.3} %, tolerance {tolerance} %", of.name())
    };
    writeln!(out, "  {}", verdict(f.verdict, f.error_percent, f.tolerance_percent))?;
    match &audit.memory {
        Some(m) => {
            writeln!(out, "audit by available memory")?;
            let (fall, accounted) = (m.fall_bytes, m.accounted_bytes.get());
            writeln!(out, "  available memory fell by {fall} bytes, {accounted} bytes are accounted for")?;
            writeln!(out, "  {}", verdict(m.verdict, m.error_percent, m.tolerance_percent))
        }
        None => writeln!(
            out,
            "audit by available memory: no baseline; 'stencil clone' records one if no clone is running"
        ),
    }
}
