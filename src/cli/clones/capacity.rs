//! `stencil capacity`: reports how many more clones of a template fit, and which resource ends first.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::clones::ps::age;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::cli::value_parsers;
use crate::clones::capacity::{self, Amount, Bounds, Capacity, Request};
use crate::clones::counted;
use crate::control;
use crate::error::Result;
use crate::store::{Store, TemplateRef};
use crate::units::{Bytes, whole};

/// Report how many more clones of a template fit, and which resource ends first
///
/// What a clone takes follows from the clones that run now, and from a recording. If further clones behave as the
/// measured ones, the truth lies between the bounds in at least 95 % of the cases.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil capacity web:1
  stencil capacity web:1 --reserve 2G --for 3600
  stencil capacity web:1 --memcg /sys/fs/cgroup/tenant --recording web.rec")]
pub struct CapacityArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = value_parsers::word::<TemplateRef>)]
    template: TemplateRef,
    /// Memory that must remain free
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true,
        value_parser = value_parsers::size)]
    reserve: Bytes,
    /// Directory of the memory cgroup in which further clones run [default: that of the present clones, if they have one
    /// in common]
    #[arg(long, value_name = "PATH")]
    memcg: Option<PathBuf>,
    /// Recording with measurements of clones
    #[arg(long, value_name = "FILE")]
    recording: Option<PathBuf>,
    /// Seconds that a clone lives [default: the age of the oldest measured clone]
    #[arg(long = "for", value_name = "SECONDS", value_parser = value_parsers::seconds)]
    lifetime: Option<Duration>,
}

#[derive(Debug, Serialize)]
struct CapacityReport {
    reference: String,
    #[serde(flatten)]
    capacity: Capacity,
}

/// Measures the clones and the host, and returns the report.
///
/// # Errors
/// Same as [`capacity::capacity`].
pub fn run(args: &CapacityArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let template = store.template(&digest)?;
    let filter = StoreFilter::of(global)?;
    let mut mounts = control::mounts_and_dead()?;
    mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
    let recorded = match &args.recording {
        Some(path) => capacity::recorded(path, &digest)?,
        None => Vec::new(),
    };
    let request = Request {
        mounts: &mounts,
        template: &template,
        reserve: args.reserve,
        cgroup: args.memcg.as_deref(),
        recorded,
        lifetime: args.lifetime,
    };
    let capacity = capacity::capacity(&request)?;
    Ok(Done::report(CapacityReport { reference: args.template.to_string(), capacity }))
}

impl Report for CapacityReport {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let c = &self.capacity;
        match c.further_clones {
            Some(further) => writeln!(
                out,
                "{} of {} fit ({} to {})",
                counted(further.estimate, "more clone", "more clones"),
                self.reference,
                further.lower,
                further.upper
            )?,
            None => writeln!(out, "no resource limits the number of clones of {}", self.reference)?,
        }
        if let Some(first) = c.ends_first {
            writeln!(out, "ends first: {}", first.name())?;
        }
        writeln!(
            out,
            "a clone takes {} after {}, {}; from {}, the oldest {}",
            range(c.bytes_per_clone, bytes),
            age(whole(c.lifetime_seconds)),
            c.growth.name(),
            counted(c.measured_clones, "clone", "clones"),
            age(whole(c.oldest_seconds)),
        )?;
        if c.pending_bytes > 0 {
            writeln!(out, "the present clones will take {} more", bytes(c.pending_bytes))?;
        }
        write!(out, "template: {} of data, {} in RAM", c.template.data_bytes, c.template.resident_bytes)?;
        match c.template.charged_bytes {
            Some(charged) => writeln!(out, ", of which {charged} are charged to the cgroup")?,
            None => writeln!(out)?,
        }
        let mut table = Columns::new(&[
            Text("RESOURCE"),
            Number("FREE"),
            Number("PER CLONE"),
            Number("CLONES"),
            Text("LIMIT"),
        ]);
        for resource in &c.resources {
            let (free, per_clone) = match resource.amount {
                Amount::Bytes { free_bytes, bytes_per_clone } => {
                    (bytes(free_bytes.estimate), bytes(bytes_per_clone.estimate))
                }
                Amount::Missing { free_bytes, missing_bytes } => {
                    (bytes(free_bytes.estimate), format!("{} once", bytes(missing_bytes)))
                }
                Amount::Tasks { free_tasks, tasks_per_clone } => {
                    (free_tasks.to_string(), tasks_per_clone.estimate.to_string())
                }
                Amount::Mappings { mappings_limit, mappings_per_clone } => {
                    (mappings_limit.to_string(), mappings_per_clone.upper.to_string())
                }
            };
            let clones =
                resource.further_clones.map_or_else(|| "-".to_owned(), |further| range(further, number));
            table.row([resource.resource.name().to_owned(), free, per_clone, clones, short(&resource.limit)]);
        }
        table.print(out)?;
        c.warnings.iter().try_for_each(|warning| writeln!(out, "note: {warning}"))
    }
}

/// Shortens the path of a cgroup or its file to the end of its name: each resource has one line.
fn short(limit: &str) -> String {
    const WIDTH: usize = 20;
    let name = limit.rsplit('/').next().unwrap_or(limit);
    match name.chars().count().saturating_sub(WIDTH) {
        0 => name.to_owned(),
        excess => format!("…{}", name.chars().skip(excess).collect::<String>()),
    }
}

fn bytes(number: u64) -> String {
    Bytes::new(number).to_string()
}

fn number(number: u64) -> String {
    number.to_string()
}

/// Formats an estimate and its bounds: `20 (18 to 23)`.
fn range(bounds: Bounds, format: fn(u64) -> String) -> String {
    let Bounds { lower, estimate, upper } = bounds;
    if lower == upper {
        return format(estimate);
    }
    format!("{} ({} to {})", format(estimate), format(lower), format(upper))
}
