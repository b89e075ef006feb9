//! `stencil density`: reports the memory that each clone has copied, and the memory of all clones.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::clones::accounting::{self, CloneMemory, Code, Density, Reasons, Survey};
use crate::clones::audit::{self, Audit, Verdict};
use crate::clones::counted;
use crate::control::{self, Mount, Served, TemplateStatus};
use crate::error::{Error, Result};
use crate::sanitize::{self, sanitize};
use crate::store::{Digest, Store, TemplateRef};
use crate::units::Bytes;

/// Arguments of `stencil density`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil density
  stencil density web:1 --why
  stencil density --audit --json")]
pub struct DensityArgs {
    /// Report this template only
    #[arg(value_name = "T")]
    template: Option<TemplateRef>,
    /// Compare the figures with page frames and with the available memory of the host, over the mounts of all stores
    #[arg(long)]
    audit: bool,
    /// Report why clones take more memory than they need. Reads the copied pages of all clones
    #[arg(long)]
    why: bool,
}

#[derive(Debug, Serialize)]
struct DensityReport {
    #[serde(flatten)]
    density: Density,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<Audit>,
    #[serde(skip)]
    explanation: Option<Explanation>,
}

/// What `--why` adds to a report.
#[derive(Debug)]
struct Explanation {
    reasons: Reasons,
    /// How each template is served, by each mount of its store.
    served: BTreeMap<Digest, Vec<ServedBy>>,
}

#[derive(Debug, Serialize)]
struct ServedBy {
    #[serde(serialize_with = "sanitize::path")]
    mountpoint: PathBuf,
    /// How the next open of the largest file of the template is served.
    serving: Served,
    /// Why that file is served by decode.
    why: Option<String>,
}

impl Explanation {
    fn new(mounts: &[Mount], survey: &Survey) -> Result<Explanation> {
        let mut served: BTreeMap<Digest, Vec<ServedBy>> = BTreeMap::new();
        for mount in mounts {
            let status = match mount.status() {
                Ok(status) => status,
                Err(error) => {
                    log::warn!("{error}");
                    continue;
                }
            };
            for template in status.templates {
                let TemplateStatus { digest, serving, why, .. } = template;
                let by = ServedBy { mountpoint: mount.mountpoint.clone(), serving, why };
                served.entry(digest).or_default().push(by);
            }
        }
        Ok(Explanation { reasons: accounting::reasons(survey)?, served })
    }
}

/// Measures the memory of the clones, and returns the report.
///
/// # Errors
/// Same as [`accounting::survey`]; also `Code::Usage` if `--audit` is given with a template.
pub fn run(args: &DensityArgs, global: &Global) -> Result<Done> {
    if args.audit && args.template.is_some() {
        return Err(Error::usage("--audit measures the whole host and takes no template")
            .hint("run 'stencil density --audit' without the template"));
    }
    let filter = StoreFilter::of(global)?;
    let mut mounts = control::mounts()?;
    if !args.audit {
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
    }
    let only = args.template.as_ref().map(|t| Store::open(&global.store)?.resolve(t)).transpose()?;
    let survey = accounting::survey(&mounts, only.as_ref())?;
    let audit = args.audit.then(|| audit::audit(&mounts, &survey)).transpose()?;
    let explanation = args.why.then(|| Explanation::new(&mounts, &survey)).transpose()?;
    Ok(Done::report(DensityReport { density: survey.density, audit, explanation }))
}

impl Report for DensityReport {
    fn json(&self) -> Value {
        let mut report = to_json(self);
        let Some(Explanation { reasons, served }) = &self.explanation else { return report };
        for (row, template) in rows(&mut report, "templates").zip(&self.density.templates) {
            let list = reasons.templates.get(&template.digest).map_or(&[][..], Vec::as_slice);
            row["reasons"] = to_json(&list);
            let list = served.get(&template.digest).map_or(&[][..], Vec::as_slice);
            row["served"] = to_json(&list);
        }
        for (row, list) in rows(&mut report, "clones").zip(&reasons.clones) {
            row["reasons"] = to_json(list);
        }
        report
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        self.templates(out)?;
        self.clones(out)?;
        self.totals(out)?;
        self.audited(out)?;
        self.explained(out)
    }
}

fn rows<'a>(report: &'a mut Value, name: &str) -> impl Iterator<Item = &'a mut Value> {
    report[name].as_array_mut().into_iter().flatten()
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |v| format!("{v:.2}"))
}

impl DensityReport {
    fn templates(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Columns::new(&[
            Text("TEMPLATE"),
            Text("SERVING"),
            Number("SIZE"),
            Number("DATA"),
            Number("RESIDENT"),
            Number("CLONES"),
            Text("TAGS"),
        ]);
        for t in &self.density.templates {
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

    fn clones(&self, out: &mut dyn Write) -> io::Result<()> {
        // Swap and disks are rare. Without their columns, the table fits 100 columns.
        let any = |part: fn(&CloneMemory) -> Bytes| {
            self.density.clones.iter().any(|clone| part(&clone.memory) > Bytes::ZERO)
        };
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
        for c in &self.density.clones {
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

    fn totals(&self, out: &mut dyn Write) -> io::Result<()> {
        let t = &self.density.totals;
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

    /// Prints each code once, with its sum, the number of clones and the remedy.
    fn explained(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(Explanation { reasons, served }) = &self.explanation else { return Ok(()) };
        writeln!(out, "\nserving of the next open")?;
        for template in &self.density.templates {
            for ServedBy { mountpoint, serving, why } in served.get(&template.digest).into_iter().flatten() {
                let (id, place) = (template.digest.short(), sanitize::path_text(mountpoint));
                let why = why.as_ref().map_or_else(String::new, |why| format!(": {}", sanitize(why)));
                writeln!(out, "  {id}  {place}  {}{why}", serving.name())?;
            }
        }
        writeln!(out, "\nreasons")?;
        let mut sums: BTreeMap<(Code, &str), (u64, Bytes)> = BTreeMap::new();
        let of_clones = reasons.clones.iter().flatten().map(|reason| (reason, 1));
        let shown = self.density.templates.iter().filter_map(|row| reasons.templates.get(&row.digest));
        let of_templates = shown.flatten().map(|reason| (reason, 0));
        for (reason, count) in of_templates.chain(of_clones) {
            let (clones, bytes) = sums.entry((reason.code, reason.remedy)).or_default();
            *clones += count;
            *bytes += reason.bytes;
        }
        if sums.is_empty() {
            return writeln!(out, "  none");
        }
        for ((code, remedy), (clones, bytes)) in sums {
            let place = match clones {
                0 => "all clones of a template".to_owned(),
                clones => counted(clones, "clone", "clones"),
            };
            writeln!(out, "  {:<20}{:>10}  {place}", code.name(), bytes.to_string())?;
            writeln!(out, "    {remedy}")?;
        }
        Ok(())
    }

    fn audited(&self, out: &mut dyn Write) -> io::Result<()> {
        let Some(audit) = &self.audit else { return Ok(()) };
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
            writeln!(
                out,
                "  the memory of the clones changed by {:.2} % during the audit",
                f.changed_percent
            )?;
        }
        let verdict = |of: Verdict, error: f64, tolerance: f64| {
            format!("{}: off by {error:.3} %, tolerance {tolerance} %", of.name())
        };
        writeln!(out, "  {}", verdict(f.verdict, f.error_percent, f.tolerance_percent))?;
        match &audit.memory {
            Some(m) => {
                writeln!(out, "audit by available memory")?;
                let (fall, accounted) = (m.fall_bytes, m.accounted_bytes.get());
                writeln!(
                    out,
                    "  available memory fell by {fall} bytes, {accounted} bytes are accounted for"
                )?;
                writeln!(out, "  {}", verdict(m.verdict, m.error_percent, m.tolerance_percent))
            }
            None => writeln!(
                out,
                "audit by available memory: no baseline; 'stencil clone' records one if no clone is running"
            ),
        }
    }
}
