//! The default view of `stencil density`: at most 30 lines of 100 columns, for any number of clones and templates.

use std::cmp::Reverse;
use std::io::{self, Write};

use super::headroom::Headroom;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::clones::accounting::{Density, TemplateMemory, Totals};
use crate::clones::counted;
use crate::units::Bytes;

/// Largest number of templates that are listed.
const MAX_TEMPLATES: usize = 5;
/// Longest name of a template in characters.
const MAX_NAME: usize = 40;

/// Prints what the clones cost now, what one more costs, and how many more fit.
///
/// # Errors
/// Returns an error if writing to `out` fails.
pub fn print(density: &Density, headroom: Option<&Headroom>, out: &mut dyn Write) -> io::Result<()> {
    now(density, out)?;
    if density.totals.clones > 0 {
        further(density, headroom, out)?;
        ratios(&density.totals, out)?;
    }
    zero_pages(density, out)?;
    writeln!(out, "\nmore: --wide (every figure), --by user (subtotals), --why (reasons and remedies)")
}

fn now(density: &Density, out: &mut dyn Write) -> io::Result<()> {
    let t = &density.totals;
    let in_use = density.templates.iter().filter(|template| template.clones > 0).count() as u64;
    if t.clones == 0 {
        writeln!(out, "no clones; the mounted stores take {} of memory", t.host_bytes)?;
    } else {
        let (clones, templates) =
            (counted(t.clones, "clone", "clones"), counted(in_use, "template", "templates"));
        writeln!(out, "{clones} of {templates} take {} of memory", t.host_bytes)?;
    }
    let mut part = |name: &str, bytes: Bytes| writeln!(out, "  {name:<46}{bytes:>10}");
    let held = if in_use == 1 {
        "memory that the template holds once"
    } else {
        "memory that the templates hold once"
    };
    let unused: Bytes =
        density.templates.iter().filter(|template| template.clones == 0).map(|its| its.resident_bytes).sum();
    part(held, t.template_bytes.saturating_sub(unused))?;
    if unused > Bytes::ZERO {
        part("pages of templates that no clone maps", unused)?;
    }
    part("page cache of the store, and its daemons", t.store_cache_bytes)?;
    part("copied by clones", t.private_bytes)?;
    part("page tables", t.page_table_bytes)?;
    part("virtual machine monitor itself", t.overhead_bytes)?;
    if t.disk_bytes > Bytes::ZERO {
        part("disks of clones in RAM", t.disk_bytes)?;
    }
    if t.swap_bytes > Bytes::ZERO {
        part("(copied by clones, in swap: takes no memory)", t.swap_bytes)?;
    }
    Ok(())
}

fn further(density: &Density, headroom: Option<&Headroom>, out: &mut dyn Write) -> io::Result<()> {
    let t = &density.totals;
    if let Some(each) = t.bytes_per_further_clone {
        writeln!(out, "\none more clone takes {each}: the mean of these clones")?;
    }
    if let Some(count) = headroom.and_then(|its| its.further_clones) {
        writeln!(out, "about {count} more fit (estimate; 'stencil capacity T' has the limits)")?;
    }
    let limit = headroom.filter(|its| its.is_limited_by_commit());
    if let Some((left, each)) = limit.and_then(|its| its.commit_left_bytes.zip(its.commit_bytes_per_clone)) {
        writeln!(out, "  the commit limit ends first: {left} are left of it, and a clone takes {each}")?;
    }
    templates(&density.templates, headroom, out)
}

/// Prints what one more clone of each template takes, if there are clones of several templates.
fn templates(
    templates: &[TemplateMemory],
    headroom: Option<&Headroom>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let each = |its: &TemplateMemory| its.bytes_per_further_clone.unwrap_or_default();
    let mut rows: Vec<&TemplateMemory> =
        templates.iter().filter(|template| template.bytes_per_further_clone.is_some()).collect();
    if rows.len() < 2 {
        return Ok(());
    }
    rows.sort_by_key(|its| Reverse(its.resident_bytes.get() + its.clones * each(its).get()));
    let mut table = Columns::new(&[
        Text("  TEMPLATE"),
        Number("CLONES"),
        Number("HOLDS ONCE"),
        Number("ONE MORE TAKES"),
        Number("MORE FIT"),
    ]);
    for its in rows.iter().take(MAX_TEMPLATES) {
        table.row([
            format!("  {}", name(its)),
            its.clones.to_string(),
            its.resident_bytes.to_string(),
            each(its).to_string(),
            headroom
                .and_then(|all| all.fit(each(its)))
                .map_or_else(|| "-".to_owned(), |count| count.to_string()),
        ]);
    }
    table.print(out)?;
    match rows.len().saturating_sub(MAX_TEMPLATES) {
        0 => Ok(()),
        more => writeln!(
            out,
            "  and {}: --by template",
            counted(more as u64, "other template", "other templates")
        ),
    }
}

/// Returns a tag of the template and the number of the others, or the digest of a template without a tag.
fn name(template: &TemplateMemory) -> String {
    let Some(tag) = template.tags.first() else { return template.digest.short() };
    let others = match template.tags.len() {
        1 => String::new(),
        count => format!(" +{}", count - 1),
    };
    // Names often differ at the end.
    let length = tag.chars().count();
    let shortened = match length > MAX_NAME {
        true => {
            let (start, end) = (MAX_NAME / 2, length - MAX_NAME / 2);
            tag.chars().take(start).chain(['…']).chain(tag.chars().skip(end)).collect()
        }
        false => tag.clone(),
    };
    shortened + &others
}

fn ratios(t: &Totals, out: &mut dyn Write) -> io::Result<()> {
    let Some(sharing) = t.sharing_ratio else { return Ok(()) };
    writeln!(out, "\nwithout sharing, the same clones would take")?;
    writeln!(
        out,
        "  {sharing:.2} times as much ({}): each with its own copy of the template's data",
        t.copied_bytes
    )?;
    let Some(lazy) = t.lazy_ratio else { return Ok(()) };
    writeln!(out, "  {lazy:.2} times as much: each with its own copy of the pages that it touched")
}

fn zero_pages(density: &Density, out: &mut dyn Write) -> io::Result<()> {
    let zeros: Bytes = density.templates.iter().map(|template| template.resident_zero_bytes).sum();
    if zeros == Bytes::ZERO {
        return Ok(());
    }
    writeln!(out, "\nat least {zeros} of the templates' pages are zeros and take memory for nothing")?;
    writeln!(out, "  remedy: map long runs of zeros as anonymous memory, as the Rust library does")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::store::Digest;

    fn template(number: u8, clones: u64) -> TemplateMemory {
        let tag = |tag: u8| format!("{}:{}{tag}", "n".repeat(128), "t".repeat(127));
        TemplateMemory {
            digest: Digest::new([number; 32]),
            tags: BTreeSet::from([tag(1), tag(2)]),
            serving: "passthrough".to_owned(),
            size_bytes: Bytes::new(1 << 50),
            data_bytes: Bytes::new(1 << 50),
            resident_bytes: Bytes::new((1 << 50) - 1),
            resident_zero_bytes: Bytes::new(1 << 30),
            store_cache_bytes: Bytes::ZERO,
            clones,
            bytes_per_further_clone: (clones > 0).then_some(Bytes::new((1 << 40) - 1)),
        }
    }

    fn view(density: &Density, headroom: &Headroom) -> String {
        let mut out = Vec::new();
        print(density, Some(headroom), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn has_at_most_30_lines_of_100_columns_with_every_part() {
        let some = Bytes::new((1 << 50) - 1);
        let totals = Totals {
            clones: 100_000,
            mapped_bytes: some,
            copied_bytes: some,
            template_bytes: some,
            store_cache_bytes: some,
            private_bytes: some,
            page_table_bytes: some,
            overhead_bytes: some,
            disk_bytes: some,
            swap_bytes: some,
            host_bytes: some,
            bytes_per_further_clone: Some(some),
            clones_per_gib: Some(1.0),
            sharing_ratio: Some(99_999.99),
            lazy_ratio: Some(99_999.99),
            overcommit_ratio: Some(99_999.99),
        };
        let templates = (0..25).map(|number| template(number, u64::from(number) * 1000)).collect();
        let density = Density { templates, clones: vec![], totals, handlers: vec![], dead_mounts: vec![] };
        let headroom = Headroom {
            available_bytes: Bytes::new(u64::MAX),
            commit_left_bytes: Some(some),
            commit_bytes_per_clone: Some(Bytes::new(1)),
            further_clones: Some(some.get()),
        };
        let text = view(&density, &headroom);
        assert!(text.lines().count() <= 30, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        for part in
            ["hold once", "no clone maps", "disks", "swap", "commit limit", "19 other templates", "zeros"]
        {
            assert!(text.contains(part), "no {part} in {text}");
        }
    }

    #[test]
    fn without_clones_there_are_no_ratios_and_no_mean() {
        let totals = Totals {
            template_bytes: Bytes::new(5 << 20),
            host_bytes: Bytes::new(5 << 20),
            ..Totals::default()
        };
        let density =
            Density { templates: vec![], clones: vec![], totals, handlers: vec![], dead_mounts: vec![] };
        let text = view(&density, &Headroom::default());
        assert!(text.starts_with("no clones; the mounted stores take 5.00 MiB of memory\n"), "{text}");
        assert!(
            !text.contains("one more") && !text.contains("times as much") && !text.contains("fit"),
            "{text}"
        );
    }
}
