//! `stencil stop`: clones end.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Global;
use super::output::{Done, Report, to_json};
use super::store_filter::StoreFilter;
use crate::clones::registry::{self, Entry};
use crate::clones::stop::{How, stop};
use crate::error::{Error, Result};

/// Stop clones that were launched here and remove what they had
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Their ids
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
    /// Seconds until a clone that does not end is killed
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
        match (self.stopped.len(), killed) {
            (all, 0) => writeln!(out, "{all} stopped"),
            (all, killed) => writeln!(out, "{all} stopped, {killed} of them killed"),
        }
    }

    fn json(&self) -> Value {
        let row =
            |(entry, how): &(Entry, How)| json!({"id": entry.id, "pid": entry.pid, "how": to_json(how)});
        json!({ "stopped": self.stopped.iter().map(row).collect::<Vec<_>>() })
    }
}

/// Runs it.
///
/// # Errors
/// When there is no clone of an id, or one cannot be ended.
pub fn run(args: &StopArgs, global: &Global) -> Result<Done> {
    let filter = StoreFilter::of(global)?;
    let swept = registry::sweep();
    if let (Err(error), false) = (&swept, args.all) {
        log::warn!("{error}");
    }
    let mut left = None;
    let entries = if args.all {
        let (mut entries, unread) = registry::list_and_unread()?;
        left = unread.into_iter().reduce(Error::and);
        entries.retain(|entry| filter.has_clone(entry));
        entries.retain(|entry| {
            let ours = entry.expect_ours().inspect_err(|error| log::warn!("{error}"));
            // Those that a launcher still holds are its own.
            ours.is_ok() && !entry.is_launching()
        });
        entries
    } else {
        args.ids.iter().map(|id| may_be_stopped(id, &filter)).collect::<Result<Vec<_>>>()?
    };
    let how = stop(&entries, Duration::from_secs(args.grace.into()))?;
    if args.all {
        // Some of all are left.
        swept?;
        if let Some(error) = left {
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
        // It may start a process at any moment.
        let what = format!("clone {} is not ready: its launcher still holds it", entry.id);
        return Err(Error::try_again(what)
            .at(&entry.dir)
            .remedy("stop it when `stencil ps` calls it running, or interrupt its launcher"));
    }
    Ok(entry)
}
