//! `stencil stop`: stops clones.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::clones::counted;
use crate::clones::registry::{self, Entry};
use crate::clones::stop::{How, stop};
use crate::error::{Error, Result};

/// Stop clones and remove their disks, records and ports
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil stop c1a2b3c4
  stencil stop --all
  stencil stop --all --grace 60")]
pub struct StopArgs {
    /// Ids of the clones
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<String>,
    /// Stop all clones
    #[arg(long)]
    all: bool,
    /// Seconds after which a clone that is still running is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u32,
}

struct StopReport {
    stopped: Vec<(Entry, How)>,
    quiet: bool,
}

impl Report for StopReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        let killed = self.stopped.iter().filter(|(_, how)| *how == How::Killed).count();
        let all = counted(self.stopped.len() as u64, "clone", "clones");
        match killed {
            0 => writeln!(out, "{all} stopped"),
            killed => writeln!(out, "{all} stopped, {killed} of them killed"),
        }
    }

    fn json(&self) -> Value {
        let row =
            |(entry, how): &(Entry, How)| json!({"id": entry.id, "pid": entry.pid, "how": to_json(how)});
        json!({ "stopped": self.stopped.iter().map(row).collect::<Vec<_>>() })
    }
}

/// Runs `stencil stop`.
///
/// # Errors
/// Returns `Code::NotFound` if no clone has one of the ids, and an error if a clone cannot be stopped.
pub fn run(args: &StopArgs, global: &Global) -> Result<Done> {
    let filter = StoreFilter::of(global)?;
    let swept = registry::sweep();
    if let (Err(error), false) = (&swept, args.all) {
        log::warn!("{error}");
    }
    let mut unread_error = None;
    let entries = if args.all {
        let (mut entries, unread) = registry::list_and_unread()?;
        unread_error = unread.into_iter().reduce(Error::and);
        entries.retain(|entry| filter.has_clone(entry));
        entries.retain(|entry| {
            let ours = entry.expect_ours().inspect_err(|error| log::warn!("{error}"));
            // A clone that is still being launched belongs to its launcher.
            ours.is_ok() && !entry.is_launching()
        });
        entries
    } else {
        args.ids.iter().map(|id| may_be_stopped(id, &filter)).collect::<Result<Vec<_>>>()?
    };
    let how = stop(&entries, Duration::from_secs(args.grace.into()), &*global.progress())?;
    if args.all {
        // Clones of a failed sweep and of unreadable records may still be running.
        swept?;
        if let Some(error) = unread_error {
            return Ok(Done::report(stopped(entries, how, global)).but_failed(error));
        }
    }
    Ok(Done::report(stopped(entries, how, global)))
}

fn stopped(entries: Vec<Entry>, how: Vec<How>, global: &Global) -> StopReport {
    StopReport { stopped: entries.into_iter().zip(how).collect(), quiet: global.quiet }
}

fn may_be_stopped(id: &str, filter: &StoreFilter) -> Result<Entry> {
    let entry = registry::find(id)?;
    filter.expect(&entry)?;
    entry.expect_ours()?;
    if entry.is_launching() {
        // The launcher may start a process of the clone at any moment.
        let what = format!("clone {} is still being launched", entry.id);
        return Err(Error::try_again(what)
            .at(&entry.dir)
            .hint("stop the clone after 'stencil ps' lists it as running, or interrupt its launcher"));
    }
    Ok(entry)
}
