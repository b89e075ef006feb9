//! `stencil density`: reports what clones cost, what one more costs, and how many more fit.

mod audited;
mod groups;
mod headroom;
mod overview;
mod why;
mod wide;

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use self::headroom::Headroom;
use self::why::Explanation;
use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::cli::value_parsers::word;
use crate::clones::accounting::{self, By, Density, Group, Totals};
use crate::clones::audit::{self, Audit};
use crate::control::{self, Listing, Mount};
use crate::error::{Error, Result};
use crate::store::{Store, TemplateRef};

/// Arguments of `stencil density`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil density
  stencil density --by label=team
  stencil density web:1 --why")]
pub struct DensityArgs {
    /// Report this template only
    #[arg(value_name = "T")]
    template: Option<TemplateRef>,
    /// Report every figure of each template and each clone
    #[arg(long)]
    wide: bool,
    /// Report subtotals by user, cgroup, template, or the values of a label (label=KEY). Memory that clones share is
    /// split between them in equal parts; memory that no clone uses is listed apart
    #[arg(long, value_name = "PROPERTY", value_parser = word::<By>)]
    by: Option<By>,
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
    /// How many more clones fit; null if the templates of a mount cannot be measured.
    headroom: Option<Headroom>,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<Group>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<Audit>,
    #[serde(skip)]
    explanation: Option<Explanation>,
    #[serde(skip)]
    wide: bool,
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
    let has = |mount: &Mount| args.audit || filter.has(&mount.store, &mount.store_id);
    let Listing { mounts: mut all, dead, mut unread } = control::list()?;
    let (ours, others): (Vec<Mount>, Vec<Mount>) = dead.into_iter().partition(has);
    let (dead, unknown) = control::with_store_or_error(ours);
    unread.extend(unknown);
    let (of_others, unknown_others) = control::with_store_or_error(others);
    all.extend(dead.into_iter().chain(of_others));
    let mounts: Vec<Mount> = all.iter().filter(|mount| has(mount)).cloned().collect();
    let only = args.template.as_ref().map(|t| Store::open(&global.store)?.resolve(t)).transpose()?;
    let survey = accounting::survey(&mounts, only.as_ref())?;
    for dead in &survey.density.dead_mounts {
        log::warn!("{}; {}", dead.describe(), dead.remedy);
    }
    for handler in &survey.density.handlers {
        log::warn!("{}; it is not counted as a clone", handler.describe());
    }
    let audit = args.audit.then(|| audit::audit(&mounts, &survey)).transpose()?;
    let explanation = args.why.then(|| Explanation::new(&mounts, &survey)).transpose()?;
    let is_complete = unread.is_empty() && unknown_others.is_empty();
    let is_whole = only.is_none() && mounts.len() == all.len();
    let headroom = match is_complete {
        true => headroom(&survey.density.totals, (!is_whole).then_some(&all[..])),
        false => None,
    };
    let groups = args.by.as_ref().map(|by| accounting::groups(&survey, by));
    let density = survey.density;
    let report = DensityReport { density, headroom, groups, audit, explanation, wide: args.wide };
    let mut unread = unread.into_iter();
    let first = unread.next();
    unread.for_each(|error| log::warn!("{error}"));
    let done = Done::report(report);
    // The clones of a mount that cannot be read are not in the sums.
    Ok(match first {
        Some(error) => done.but_failed(error),
        None => done,
    })
}

/// Returns how many more clones fit. If the totals are not those of all mounts, `all` are these mounts. Returns `None` if
/// a figure cannot be read: the report about the present clones needs none of them.
fn headroom(totals: &Totals, all: Option<&[Mount]>) -> Option<Headroom> {
    let templates = all.map_or(Ok(totals.template_bytes), accounting::template_bytes);
    let headroom = templates.and_then(|templates| Headroom::now(totals, templates));
    headroom.inspect_err(|error| log::warn!("the number of further clones is unknown: {error}")).ok()
}

impl Report for DensityReport {
    fn json(&self) -> Value {
        let mut report = to_json(self);
        self.explanation.iter().for_each(|explanation| explanation.add_to(&mut report, &self.density));
        report
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.wide {
            wide::print(&self.density, out)?;
        }
        match &self.groups {
            Some(groups) => groups::print(groups, out)?,
            None if self.wide => {}
            None => overview::print(&self.density, self.headroom.as_ref(), out)?,
        }
        self.audit.iter().try_for_each(|audit| audited::print(audit, out))?;
        self.explanation.iter().try_for_each(|explanation| explanation.print(&self.density, out))
    }
}
