//! `stencil working-set`: records, lists and removes the working sets of templates.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use crate::cli::clones::dirty::pid_of;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::clones::working_set::{count, record};
use crate::control;
use crate::error::{Error, Result};
use crate::store::{DEFAULT_SET, Digest, Store, TemplateRef, WorkingSet, check_name};
use crate::units::{Bytes, PageCount};

/// Record which pages of a template its clones use, for 'stencil warm' and 'stencil clone'
///
/// 'stencil clone' reads the pages of the set 'default' while the clones start. A set is stored with its template;
/// 'save' and 'load' carry it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil clone web:1 --record-working-set
  stencil working-set record c1a2b3c4 --for 5
  stencil working-set ls web:1")]
pub struct WorkingSetArgs {
    #[command(subcommand)]
    command: WorkingSetCommand,
}

#[derive(Debug, Subcommand)]
enum WorkingSetCommand {
    Record(RecordArgs),
    Ls(LsArgs),
    Rm(RmArgs),
}

/// Add the pages that a clone has used to a working set of its template
///
/// A page that three recordings in a row do not have leaves the set. The kernel maps pages near a used page too (64
/// KiB, or 2 MiB at once): 'stencil clone --record-working-set' records more precisely.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil working-set record c1a2b3c4
  stencil working-set record 4711 --for 5 --set login")]
pub struct RecordArgs {
    /// Id or process id of the clone
    #[arg(value_name = "CLONE")]
    clone: String,
    /// Seconds during which pages that the clone begins to use are recorded, in the order of their first use
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 0)]
    seconds: u32,
    /// Name of the set
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SET, value_parser = set_name)]
    set: String,
}

/// List the working sets of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil working-set ls web:1
  stencil --json working-set ls web:1")]
pub struct LsArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
}

/// Remove a working set of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil working-set rm web:1
  stencil working-set rm web:1 --set login")]
pub struct RmArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Name of the set
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SET, value_parser = set_name)]
    set: String,
}

/// Parses the name of a working set.
pub fn set_name(text: &str) -> Result<String, String> {
    check_name("name of a working set", text).map(|()| text.to_owned()).map_err(|e| e.to_string())
}

/// A working set that a recording was added to.
#[derive(Debug, Serialize)]
pub struct Recorded {
    digest: Digest,
    set: String,
    recordings: u32,
    recorded_pages: PageCount,
    recorded_written_pages: PageCount,
    pages: PageCount,
    bytes: Bytes,
}

impl Recorded {
    /// Records a clone and adds the recording to a set.
    ///
    /// # Errors
    /// Returns an error if the clone cannot be inspected, or if the set cannot be stored.
    pub fn add(
        store: &Store,
        set: &str,
        pid: u32,
        duration: Duration,
        stop: &AtomicBool,
    ) -> Result<Recorded> {
        let (digest, used) = record(pid, &control::mounts()?, duration, stop)?;
        let merged = store.add_recording(&digest, set, &used)?;
        Ok(Recorded {
            digest,
            set: set.to_owned(),
            recordings: merged.recordings,
            recorded_pages: used.values().map(|used| count(&used.touched)).sum(),
            recorded_written_pages: used.values().map(|used| count(&used.written)).sum(),
            pages: merged.pages(),
            bytes: merged.pages().bytes(),
        })
    }
}

impl Report for Recorded {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "recorded {}, {} of them written; working set '{}' of {} has {} ({}) from {}",
            counted(self.recorded_pages.get(), "page", "pages"),
            self.recorded_written_pages.get(),
            self.set,
            self.digest.short(),
            counted(self.pages.get(), "page", "pages"),
            self.bytes,
            counted(self.recordings.into(), "recording", "recordings"),
        )
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

#[derive(Debug, Serialize)]
struct Row {
    set: String,
    recordings: u32,
    pages: PageCount,
    bytes: Bytes,
    /// Pages of each file.
    files: BTreeMap<String, FileRow>,
}

#[derive(Debug, Serialize)]
struct FileRow {
    pages: PageCount,
    /// Pages that a clone has copied in at least one recording that still counts.
    written_pages: PageCount,
}

#[derive(Debug, Serialize)]
struct List {
    digest: Digest,
    working_sets: Vec<Row>,
}

impl Report for List {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for row in &self.working_sets {
            let recordings = counted(row.recordings.into(), "recording", "recordings");
            writeln!(out, "{}: {} from {recordings}", row.set, row.bytes)?;
            for (name, file) in &row.files {
                let pages = counted(file.pages.get(), "page", "pages");
                writeln!(out, "  {name}: {pages}, {} of them written", file.written_pages.get())?;
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

#[derive(Debug, Serialize)]
struct Removed {
    digest: Digest,
    set: String,
}

impl Report for Removed {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "removed working set '{}' of {}", self.set, self.digest.short())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Returns the error for a template without a set of this name.
pub fn no_set(template: &str, set: &str) -> Error {
    Error::not_found(format!("template {template} has no working set '{set}'"))
        .hint("list the sets: stencil working-set ls T; record one: stencil clone T --record-working-set")
}

/// Runs `stencil working-set`.
///
/// # Errors
/// Returns `Code::NotFound` if the clone, the template or the set does not exist.
pub fn run(args: &WorkingSetArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    match &args.command {
        WorkingSetCommand::Record(args) => {
            let duration = Duration::from_secs(args.seconds.into());
            let pid = pid_of(&args.clone)?;
            Ok(Done::report(Recorded::add(&store, &args.set, pid, duration, &*interrupt::flag()?)?))
        }
        WorkingSetCommand::Ls(args) => {
            let digest = store.resolve(&args.template)?;
            let names: Vec<String> = store.template(&digest)?.policy().working_sets.keys().cloned().collect();
            let found = names.into_iter().map(|name| {
                let set = store.working_set(&digest, &name)?.unwrap_or_default();
                Ok(row((name, set)))
            });
            let working_sets = found.collect::<Result<_>>()?;
            Ok(Done::report(List { digest, working_sets }))
        }
        WorkingSetCommand::Rm(args) => {
            let digest = store.resolve(&args.template)?;
            match store.remove_working_set(&digest, &args.set)? {
                true => Ok(Done::report(Removed { digest, set: args.set.clone() })),
                false => Err(no_set(&args.template.to_string(), &args.set)),
            }
        }
    }
}

fn row((name, set): (String, WorkingSet)) -> Row {
    let files = set.files.iter().map(|(name, file)| {
        let row = FileRow { pages: file.touched.pages(), written_pages: file.written.pages() };
        (name.clone(), row)
    });
    Row {
        set: name,
        recordings: set.recordings,
        pages: set.pages(),
        bytes: set.pages().bytes(),
        files: files.collect(),
    }
}
