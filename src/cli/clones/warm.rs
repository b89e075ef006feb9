//! `stencil warm`: reads the working set of a template into memory.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::clones::working_set::{no_set, set_name};
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::clones::launch::Target;
use crate::clones::working_set::{Comparison, Warmed, compare, pin, warm};
use crate::control;
use crate::error::Result;
use crate::store::{DEFAULT_SET, Digest, Store, TemplateRef};
use crate::units::{PageCount, approximate};

/// Interval at which `warm --pin` checks for an interrupt.
const INTERVAL: Duration = Duration::from_millis(100);

/// Read the pages of a template that its clones will use into memory
///
/// Reads the pages of a recorded working set in the order of their first use. Also compares the set with the running
/// clones: hits are pages of the set that a clone uses, waste are pages of the set that no clone uses.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil warm web:1
  stencil warm web:1 --dry-run
  stencil warm web:1 --pin")]
pub struct WarmArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Name of the working set
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SET, value_parser = set_name)]
    set: String,
    /// Keep the pages in memory until this command is interrupted: it maps the template and locks the pages. Other
    /// commands list this process among those that map the template
    #[arg(long, conflicts_with = "dry_run")]
    pin: bool,
    /// Read nothing; only compare the set with the clones
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct WarmReport {
    digest: Digest,
    set: String,
    recordings: u32,
    pages: PageCount,
    /// Null with `--dry-run`.
    warmed: Option<Warmed>,
    /// Null if there are no clones, or if a process cannot be inspected.
    comparison: Option<Comparison>,
}

impl Report for WarmReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "working set '{}' of {}: {} ({}) from {}",
            self.set,
            self.digest.short(),
            counted(self.pages.get(), "page", "pages"),
            self.pages.bytes(),
            counted(self.recordings.into(), "recording", "recordings")
        )?;
        if let Some(warmed) = &self.warmed {
            writeln!(
                out,
                "in memory before: {}; read: {} in {:.2} s",
                warmed.cached_pages.bytes(),
                warmed.read_pages.bytes(),
                warmed.duration.as_secs_f64()
            )?;
        }
        if let Some(found) = &self.comparison {
            let share = |part: PageCount, of: PageCount| {
                100.0 * approximate(part.get()) / approximate(of.get().max(1))
            };
            writeln!(
                out,
                "used by {}: {}, {:.0} % of them in the set; {} of the set ({:.0} %) not used",
                counted(found.clones as u64, "clone", "clones"),
                counted(found.touched_pages.get(), "page", "pages"),
                share(found.hits, found.touched_pages),
                counted(found.waste.get(), "page", "pages"),
                share(found.waste, self.pages)
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil warm`.
///
/// # Errors
/// Returns `Code::NotFound` if the template or the set does not exist or the store is not mounted, and an error if the
/// pages cannot be read.
pub fn run(args: &WarmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (target, _lease) = Target::find(&store, &args.template, "warm")?;
    let set = store.working_set(&target.digest, &args.set)?;
    let set = set.ok_or_else(|| no_set(&target.name, &args.set))?;
    let stop = interrupt::flag()?;
    let compared = control::mounts().and_then(|mounts| compare(&target.digest, &set, &mounts));
    let comparison = compared.unwrap_or_else(|error| {
        log::warn!("the set is not compared with the clones: {error}");
        None
    });
    let warmed = match args.dry_run {
        true => None,
        false => Some(warm(&target.dir, &target.files, &set, &stop, &*global.progress())?),
    };
    if args.pin {
        let _pinned = pin(&target.dir, &target.files, &set, &stop)?;
        crate::print_line!("{} pinned until this command is interrupted", set.pages().bytes());
        wait(&stop);
    }
    Ok(Done::report(WarmReport {
        digest: target.digest,
        set: args.set.clone(),
        recordings: set.recordings,
        pages: set.pages(),
        warmed,
        comparison,
    }))
}

fn wait(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(INTERVAL);
    }
}
