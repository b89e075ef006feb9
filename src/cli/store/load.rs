//! `stencil load`: loads templates from a stream of `stencil save`.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::{STALL, mode, seconds, word};
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::error::{Code, Error, Result};
use crate::store::{Incoming, LoadRequest, Loaded, Owner, Store, TagName};
use crate::sys::files::stream::open_source;

/// Load templates from a stream that `stencil save` has written
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil load -i web.stencil
  ssh host stencil save web:1 | stencil load
  stencil load -i web.stencil --no-recipes --no-tags")]
pub struct LoadArgs {
    /// File to read instead of standard input
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Permission bits of the files in a mount, in octal, instead of the saved ones
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<u32>,
    /// Owner of the files in a mount, by name or number, instead of the saved numbers
    #[arg(long, value_name = "U[:G]", value_parser = word::<Owner>)]
    owner: Option<Owner>,
    /// Omit launch recipes, which are command lines that stencil clone runs
    #[arg(long)]
    no_recipes: bool,
    /// Create and move no tags; find the loaded templates by their digests
    #[arg(long)]
    no_tags: bool,
    /// Fail if the stream delivers no data for this time; 0 waits without limit
    #[arg(long, value_name = "SECONDS", default_value = STALL, value_parser = seconds)]
    stall_timeout: Duration,
}

#[derive(Serialize)]
struct LoadReport {
    #[serde(flatten)]
    loaded: Loaded,
    seconds: f64,
}

impl Report for LoadReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for template in &self.loaded.templates {
            let tags: Vec<String> = template.tags.iter().map(TagName::to_string).collect();
            let tags = if tags.is_empty() { "-".into() } else { tags.join(" ") };
            let existed = if template.existed { " (already stored)" } else { "" };
            writeln!(out, "{tags} {}{existed}", template.digest)?;
            for moved in &template.moved {
                writeln!(out, "  {moved}")?;
            }
            if template.recipe {
                writeln!(out, "  has a launch recipe; inspect the recipe before stencil clone runs it")?;
            }
        }
        let Loaded { blocks, skipped_blocks, stored_bytes, repaired_blocks, stream_bytes, .. } = &self.loaded;
        let rate = stream_bytes.per_second(self.seconds);
        writeln!(
            out,
            "{} in a stream of {stream_bytes}, {skipped_blocks} of them already stored; {stored_bytes} added to the \
             store; {:.1} s, {rate}/s",
            counted(*blocks, "block", "blocks"),
            self.seconds
        )?;
        if *repaired_blocks > 0 {
            writeln!(out, "{} repaired", counted(*repaired_blocks, "damaged block", "damaged blocks"))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil load`.
///
/// # Errors
/// Same as [`Incoming::open`] and [`Store::load`].
pub fn run(args: &LoadArgs, global: &Global) -> Result<Done> {
    let (file, name) = match args.input.as_deref().filter(|path| path.as_os_str() != "-") {
        Some(path) => (open(path)?, path),
        None if io::stdin().is_terminal() => {
            return Err(Error::usage("refusing to read a stream of templates from a terminal")
                .hint("name a file with -i, or use a pipe: ssh HOST stencil save T | stencil load"));
        }
        None => {
            let stdin = rustix::io::dup(io::stdin())
                .map_err(|e| Error::io("cannot read", "standard input", e.into()))?;
            (File::from(stdin), Path::new("standard input"))
        }
    };
    let start = Instant::now();
    // The stream is opened first, so that an invalid stream creates no store.
    let incoming = Incoming::open(file, name, Some(interrupt::flag()?), Some(args.stall_timeout))?;
    let store = match incoming.builds_on() {
        // A new store cannot have the template that the stream builds on.
        Some(base) => Store::open(&global.store)
            .map_err(|e| e.context(format!("the stream was saved without the blocks of template {base}")))?,
        None => Store::open_or_create(&global.store)?,
    };
    let request = LoadRequest {
        mode: args.mode,
        owner: args.owner.unwrap_or_default(),
        without_recipes: args.no_recipes,
        without_tags: args.no_tags,
    };
    let loaded = store.load(incoming, &request, &*global.progress())?;
    Ok(Done::report(LoadReport { loaded, seconds: start.elapsed().as_secs_f64() }))
}

fn open(path: &Path) -> Result<File> {
    const REMEDY: &str = "name a file that 'stencil save -o' has written, or - for standard input";
    let fail = |e| {
        let error = Error::io("cannot open the stream", path, e);
        if error.code() == Code::NotFound { error.hint(REMEDY) } else { error }
    };
    let file = open_source(path).map_err(fail)?;
    match file.metadata().map_err(fail)?.is_dir() {
        true => {
            Err(Error::usage("expected a stream of stencil save, found a directory").at(path).hint(REMEDY))
        }
        false => Ok(file),
    }
}
