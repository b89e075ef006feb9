//! The page: sections of pictures and tables.

use serde::Serialize;

use super::figures::{Change, Comparison, Figures, Moment, TemplateFigures, Unit};
use super::growth::GrowthStep;
use super::html::{Cell, Heading, beside, escape, list, table};
use super::plot::{Axis, Layer, Plot, plot, strip};
use crate::cli::output::to_json;
use crate::clones::counted;
use crate::clones::recording::{FilePlaces, TotalsSample};
use crate::error::Result;
use crate::sanitize::path_text;
use crate::units::{Bytes, PageCount, approximate};

/// Parts of `host_bytes`: their names, and their values in a sample.
type Part = (&'static str, fn(&TotalsSample) -> Bytes);
const PARTS: [Part; 6] = [
    ("template pages", |t| t.template_bytes),
    ("store cache", |t| t.store_cache_bytes),
    ("copied pages", |t| t.private_bytes),
    ("page tables", |t| t.page_table_bytes),
    ("overhead", |t| t.overhead_bytes),
    ("disks in RAM", |t| t.disk_bytes),
];

/// Returns the page of one recording.
///
/// # Errors
/// Returns an error if a picture cannot be drawn.
pub fn page(figures: &Figures) -> Result<String> {
    let title = format!("Memory of clones: {}", path_text(&figures.file));
    Ok(document(&title, &body(figures, "")?, figures))
}

/// Returns the page of two recordings.
///
/// # Errors
/// Same as [`page`].
pub fn comparison(both: &Comparison) -> Result<String> {
    let (before, after) = (path_text(&both.before.file), path_text(&both.after.file));
    let title = format!("Memory of clones: {before} and {after}");
    let headings = ["figure", "before", "after", "difference"].map(|name| Heading(name, None));
    let changes = table("changes", &headings, both.changes.iter().map(change));
    let content = format!(
        "<h2>Before and after</h2>\n<p>Totals are of the last sample, the cost of one more \
         clone of the last sample with clones.</p>\n{changes}<div class=\"pair\">\n\
         <section><h2>Before</h2>\n{}</section>\n<section><h2>After</h2>\n{}</section></div>\n",
        body(&both.before, "before-")?,
        body(&both.after, "after-")?
    );
    Ok(document(&title, &content, both))
}

/// Returns the whole document. The figures are in it as JSON, too.
fn document(title: &str, content: &str, figures: &impl Serialize) -> String {
    // A browser ends the element at the first `</script`, whatever the string around it is.
    let json = to_json(figures).to_string().replace('<', "\\u003c");
    let (title, style) = (escape(title), include_str!("style.css"));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{style}</style></head>\n<body>\n<h1>{title}</h1>\n{content}\
         <script type=\"application/json\" id=\"figures\">{json}</script>\n</body></html>\n"
    )
}

fn change(change: &Change) -> Vec<Cell> {
    let show = |number: u64| match change.unit {
        Unit::Bytes => Bytes::new(number).to_string(),
        Unit::Clones => number.to_string(),
    };
    let cell = |number: Option<u64>| number.map_or(Cell::Unknown, |n| Cell::Number(n, show(n)));
    let difference = match (change.before, change.after) {
        (Some(before), Some(after)) if after >= before => format!("+{}", show(after - before)),
        (Some(before), Some(after)) => format!("−{}", show(before - after)),
        _ => "unknown".to_owned(),
    };
    vec![
        Cell::Text(change.figure.to_owned()),
        cell(change.before),
        cell(change.after),
        Cell::Text(difference),
    ]
}

/// Returns the sections of one recording. `prefix` makes the ids of two recordings different.
fn body(figures: &Figures, prefix: &str) -> Result<String> {
    let mut html = format!(
        "<p>{}, {} to {}.</p>\n",
        counted(figures.samples, "sample", "samples"),
        figures.first,
        figures.last
    );
    html += &answers(figures);
    html += &further_clone(figures, prefix)?;
    html += &all_clones(figures, prefix)?;
    for (index, template) in figures.templates.iter().enumerate() {
        html += &of_template(template, &format!("{prefix}template-{index}-"))?;
    }
    html += &host(figures, prefix)?;
    html += &reasons(figures, prefix);
    Ok(html)
}

fn answers(figures: &Figures) -> String {
    let totals = &figures.totals;
    let now = format!("{} take", counted(totals.clones, "clone", "clones"));
    let mut answers = vec![(now, totals.host_bytes.to_string())];
    if let Some(further) = &figures.further_clone {
        answers.push(("one more clone takes".to_owned(), further.bytes.to_string()));
    }
    if let Some(available) = figures.history.last().and_then(|moment| moment.available_bytes) {
        answers.push(("available on the host".to_owned(), available.to_string()));
    }
    let answer = |(name, value): (String, String)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n");
    format!("<dl class=\"answers\">\n{}</dl>\n", answers.into_iter().map(answer).collect::<String>())
}

fn time_axis(figures: &Figures) -> Axis {
    // The wall clock may have been set back.
    let last = figures.history.iter().map(|moment| moment.seconds).fold(0.0, f64::max);
    Axis::seconds("time since the first sample", last)
}

fn further_clone(figures: &Figures, prefix: &str) -> Result<String> {
    let title = "<h2>The cost of one more clone</h2>\n";
    let Some(further) = &figures.further_clone else {
        return Ok(format!("{title}<p>No sample has clones.</p>\n"));
    };
    let known: Vec<(&Moment, Bytes)> =
        figures.history.iter().filter_map(|m| Some((m, m.totals.bytes_per_further_clone?))).collect();
    let points = known.iter().map(|(m, bytes)| (m.seconds, approximate(bytes.get()))).collect();
    let max = known.iter().map(|(_, bytes)| *bytes).max().unwrap_or_default();
    let y = Axis::bytes("one more clone", max);
    let picture =
        plot("cost of one more clone over time", &time_axis(figures), &y, &[Layer::Line(0, points)])?;
    let single = &further.of_single_clones;
    let parts = [
        ("copied pages", further.private_bytes),
        ("page tables", further.page_table_bytes),
        ("overhead of the virtual machine monitor", further.overhead_bytes),
        ("disk in RAM", further.disk_bytes),
        ("one more clone", further.bytes),
        ("10 of 100 clones have at most", single.p10_bytes),
        ("50 of 100 clones have at most", single.p50_bytes),
        ("90 of 100 clones have at most", single.p90_bytes),
    ];
    let parts = parts.map(|(name, bytes)| (name.to_owned(), Cell::bytes(bytes), None));
    let headings = [Heading("time", None), Heading("clones", None), Heading("one more clone", Some(0))];
    let rows = known.iter().map(|(moment, bytes)| {
        vec![Cell::Time(moment.time), Cell::count(moment.totals.clones), Cell::bytes(*bytes)]
    });
    let tables = list(&format!("{prefix}further-parts"), parts)
        + &table(&format!("{prefix}further-history"), &headings, rows);
    let text = format!(
        "<p>Memory that only this clone has, as the mean of {} at {}. Template pages are in RAM already. In \
         the figures of single clones, a frame that several clones share counts in each of them.</p>\n",
        counted(further.clones, "clone", "clones"),
        further.time
    );
    Ok(format!("{title}{text}{}", beside(&format!("{prefix}further"), &picture, &tables)))
}

/// Draws the parts of the memory over time; of one sample, beside each other.
fn parts_over_time(figures: &Figures) -> Result<Plot> {
    // A recording of others may have another sum in `host_bytes`, and plotters cannot draw far outside of an axis.
    let sum = |moment: &Moment| -> Bytes { PARTS.iter().map(|(_, part)| part(&moment.totals)).sum() };
    let max = figures.history.iter().map(sum).max().unwrap_or_default();
    if let [moment] = &figures.history[..] {
        let sizes = PARTS.map(|(_, part)| part(&moment.totals));
        return strip("memory of all clones, by part", &Axis::bytes("memory", max), &segments(sizes));
    }
    let times: Vec<f64> = figures.history.iter().map(|moment| moment.seconds).collect();
    let mut below = vec![0.0; times.len()];
    let mut layers = Vec::new();
    for (color, (_, part)) in (0..).zip(PARTS) {
        let sizes = figures.history.iter().map(|moment| approximate(part(&moment.totals).get()));
        let above: Vec<f64> = sizes.zip(&below).map(|(size, below)| below + size).collect();
        let edge =
            |sizes: &[f64]| -> Vec<(f64, f64)> { times.iter().copied().zip(sizes.iter().copied()).collect() };
        let mut outline = edge(&above);
        outline.extend(edge(&below).into_iter().rev());
        layers.push(Layer::Area(color, outline));
        below = above;
    }
    let y = Axis::bytes("memory", max);
    plot("memory of all clones over time, by part", &time_axis(figures), &y, &layers)
}

/// Returns bars of these sizes beside each other, each in the colour of its series.
fn segments(sizes: impl IntoIterator<Item = Bytes>) -> Vec<Layer> {
    let mut from = 0.0;
    let segment = |(color, size): (u8, Bytes)| {
        let to = from + approximate(size.get());
        let bar = [from, to, 0.0, 1.0];
        from = to;
        Layer::Bars(color, vec![bar])
    };
    (0..).zip(sizes).map(segment).collect()
}

fn all_clones(figures: &Figures, prefix: &str) -> Result<String> {
    let picture = parts_over_time(figures)?;
    let mut headings = vec![Heading("time", None), Heading("clones", None), Heading("all", None)];
    headings.extend((0..).zip(PARTS).map(|(color, (name, _))| Heading(name, Some(color))));
    let rows = figures.history.iter().map(|moment| {
        let totals = &moment.totals;
        let mut row =
            vec![Cell::Time(moment.time), Cell::count(totals.clones), Cell::bytes(totals.host_bytes)];
        row.extend(PARTS.iter().map(|(_, part)| Cell::bytes(part(totals))));
        row
    });
    let now = (0..)
        .zip(PARTS)
        .map(|(color, (name, part))| (name.to_owned(), Cell::bytes(part(&figures.totals)), Some(color)));
    let sum = ("memory of all clones".to_owned(), Cell::bytes(figures.totals.host_bytes), None);
    let tables = list(&format!("{prefix}parts"), now.chain([sum]))
        + &table(&format!("{prefix}history"), &headings, rows);
    Ok(format!(
        "<h2>Memory of all clones</h2>\n<p>RAM that the clones, their templates and the mounts take. Each page frame \
         counts once.</p>\n{}",
        beside(&format!("{prefix}all"), &picture, &tables)
    ))
}

fn of_template(template: &TemplateFigures, prefix: &str) -> Result<String> {
    let name = if template.tags.is_empty() {
        template.digest.short()
    } else {
        format!("{} ({})", template.tags.join(", "), template.digest.short())
    };
    let set = template
        .working_set
        .as_ref()
        .map_or_else(|| Cell::Text("not recorded".to_owned()), |set| Cell::bytes(set.pages.bytes()));
    let facts = [
        ("clones", Cell::count(template.clones)),
        ("served by", Cell::Text(template.serving.clone())),
        ("size", Cell::bytes(template.size_bytes)),
        ("data", Cell::bytes(template.data_bytes)),
        ("in RAM, once for all clones", Cell::bytes(template.resident_bytes)),
        ("working set", set),
    ];
    let facts = facts.map(|(name, cell)| (name.to_owned(), cell, None));
    let mut html = format!(
        "<h2>Template {}</h2>\n<p>State at {}.</p>\n{}",
        escape(&name),
        template.time,
        list(&format!("{prefix}facts"), facts)
    );
    html += &growth(&template.growth, prefix)?;
    for (index, places) in template.places.iter().enumerate() {
        html += &of_file(places, template.clones, &format!("{prefix}file-{index}-"))?;
    }
    Ok(html)
}

fn seconds(ms: u64) -> f64 {
    approximate(ms) / 1000.0
}

/// A quantile of the copied memory: its name, and its value in a step.
type Quantile = (&'static str, fn(&GrowthStep) -> Bytes);

fn growth(steps: &[GrowthStep], prefix: &str) -> Result<String> {
    let title = "<h3>Copied memory by age</h3>\n";
    let (Some(last), Some(max)) = (steps.last(), steps.iter().map(|step| step.copied.p90_bytes).max()) else {
        return Ok(format!("{title}<p>No clone has a known age.</p>\n"));
    };
    let quantiles: [Quantile; 3] = [
        ("10 of 100 clones", |step| step.copied.p10_bytes),
        ("50 of 100", |step| step.copied.p50_bytes),
        ("90 of 100", |step| step.copied.p90_bytes),
    ];
    let layers: Vec<Layer> = (0..)
        .zip(quantiles)
        .map(|(color, (_, of))| {
            let point = |step: &GrowthStep| (seconds(step.to_ms), approximate(of(step).get()));
            Layer::Line(color, steps.iter().map(point).collect())
        })
        .collect();
    let x = Axis::seconds("age of the clone", seconds(last.to_ms));
    let picture = plot("copied memory by age of the clone", &x, &Axis::bytes("copied", max), &layers)?;
    let mut headings = vec![Heading("age from", None), Heading("to", None), Heading("clones", None)];
    headings.extend((0..).zip(quantiles).map(|(color, (name, _))| Heading(name, Some(color))));
    let rows = steps.iter().map(|step| {
        let age = |ms: u64| Cell::Number(ms, format!("{:.1} s", seconds(ms)));
        let mut row = vec![age(step.from_ms), age(step.to_ms), Cell::count(step.clones)];
        row.extend(quantiles.iter().map(|(_, of)| Cell::bytes(of(step))));
        row
    });
    let rows = table(&format!("{prefix}growth-table"), &headings, rows);
    Ok(format!(
        "{title}<p>The most that 10, 50 and 90 of 100 clones have copied, in RAM and in swap. Each clone counts once in a \
         row.</p>\n{}",
        beside(&format!("{prefix}growth"), &picture, &rows)
    ))
}

fn of_file(places: &FilePlaces, clones: u64, prefix: &str) -> Result<String> {
    let bucket = places.bucket_pages.bytes().get();
    let set = |index: usize| places.working_set_pages.get(index).copied().unwrap_or(0);
    let max = places.dirty_pages.iter().copied().max().unwrap_or(0);
    let bars = |color, pages: &[u64]| {
        let bar = |(index, pages): (usize, &u64)| {
            let from = approximate(index as u64 * bucket);
            [from, from + approximate(bucket), 0.0, approximate(*pages)]
        };
        Layer::Bars(color, pages.iter().enumerate().filter(|(_, pages)| **pages > 0).map(bar).collect())
    };
    let end = Bytes::new(places.dirty_pages.len() as u64 * bucket);
    let x = Axis::bytes("offset in the file", end);
    let label = format!("dirty pages of {} by offset in the file", counted(clones, "clone", "clones"));
    let copies = plot(&label, &x, &Axis::count("dirty pages", max), &[bars(0, &places.dirty_pages)])?;
    let headings = [
        Heading("offset from", None),
        Heading("to", None),
        Heading("dirty pages", Some(0)),
        Heading("pages of the working set", Some(1)),
    ];
    let used = places.dirty_pages.iter().enumerate().filter(|(index, pages)| **pages + set(*index) > 0);
    let rows = used.map(|(index, pages)| {
        let start = index as u64 * bucket;
        vec![
            Cell::bytes(Bytes::new(start)),
            Cell::bytes(Bytes::new(start + bucket)),
            Cell::count(*pages),
            Cell::count(set(index)),
        ]
    });
    let rows = table(&format!("{prefix}places-table"), &headings, rows);
    let mut html = format!(
        "<h3>Where copies lie in the file {}</h3>\n<p>Dirty pages of all clones together, in parts of {}. Parts without \
         such pages are not listed.</p>\n{}",
        escape(&places.file),
        PageCount::new(places.bucket_pages.get()).bytes(),
        beside(&format!("{prefix}places"), &copies, &rows)
    );
    if let Some(max) = places.working_set_pages.iter().copied().max() {
        let y = Axis::count("pages of the working set", max);
        let picture =
            plot("pages of the working set by offset", &x, &y, &[bars(1, &places.working_set_pages)])?;
        html += &beside(&format!("{prefix}working-set"), &picture, "");
    }
    Ok(html)
}

fn host(figures: &Figures, prefix: &str) -> Result<String> {
    let title = "<h2>What host memory consists of</h2>\n";
    let total: Bytes = figures.host.iter().map(|part| part.bytes).sum();
    if total == Bytes::ZERO {
        return Ok(format!("{title}<p>Not recorded.</p>\n"));
    }
    let layers = segments(figures.host.iter().map(|part| part.bytes));
    let picture = strip("parts of the host's memory", &Axis::bytes("memory of the host", total), &layers)?;
    let rows = (0..)
        .zip(&figures.host)
        .map(|(color, part)| (part.part.to_owned(), Cell::bytes(part.bytes), Some(color)));
    let rows = list(&format!("{prefix}host-table"), rows);
    Ok(format!(
        "{title}<p>By /proc/meminfo at {}, of all processes. Template pages are in the page cache, copied pages are \
         anonymous memory.</p>\n{}",
        figures.last,
        beside(&format!("{prefix}host"), &picture, &rows)
    ))
}

fn reasons(figures: &Figures, prefix: &str) -> String {
    let title = "<h2>Why clones take more memory than they need</h2>\n";
    let Some(recorded) = &figures.reasons else {
        return format!(
            "{title}<p>Not recorded. Add a sample with <code>stencil record FILE --count 1 --why</code>.</p>\n"
        );
    };
    if recorded.reasons.is_empty() {
        return format!("{title}<p>No reason found at {}.</p>\n", recorded.time);
    }
    let headings = ["reason", "clones", "bytes", "remedy"].map(|name| Heading(name, None));
    let rows = recorded.reasons.iter().map(|reason| {
        let clones = match reason.clones {
            0 => Cell::Text("all of a template".to_owned()),
            clones => Cell::count(clones),
        };
        vec![
            Cell::Text(reason.code.clone()),
            clones,
            Cell::bytes(reason.bytes),
            Cell::Text(reason.remedy.clone()),
        ]
    });
    format!(
        "{title}<p>At {}. Two reasons may explain the same bytes.</p>\n{}",
        recorded.time,
        table(&format!("{prefix}reasons"), &headings, rows)
    )
}
