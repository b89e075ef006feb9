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
use crate::clones::accounting::{self, By, Density, Group};
use crate::clones::audit::{self, Audit};
use crate::control;
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
    headroom: Headroom,
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
    let mut mounts = control::mounts_and_dead()?;
    if !args.audit {
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
    }
    let only = args.template.as_ref().map(|t| Store::open(&global.store)?.resolve(t)).transpose()?;
    let survey = accounting::survey(&mounts, only.as_ref())?;
    for dead in &survey.density.dead_mounts {
        log::warn!("{}: {}", dead.describe(), dead.remedy);
    }
    for handler in &survey.density.handlers {
        log::warn!("{}; neither is counted as a clone", handler.describe());
    }
    let audit = args.audit.then(|| audit::audit(&mounts, &survey)).transpose()?;
    let explanation = args.why.then(|| Explanation::new(&mounts, &survey)).transpose()?;
    let headroom = Headroom::now(&survey.density.totals)?;
    let groups = args.by.as_ref().map(|by| accounting::groups(&survey, by));
    let density = survey.density;
    Ok(Done::report(DensityReport { density, headroom, groups, audit, explanation, wide: args.wide }))
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
            None => overview::print(&self.density, &self.headroom, out)?,
        }
        self.audit.iter().try_for_each(|audit| audited::print(audit, out))?;
        self.explanation.iter().try_for_each(|explanation| explanation.print(&self.density, out))
    }
}
