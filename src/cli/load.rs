//! `stencil load`: templates from a stream of `stencil save`.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::output::{Done, Report, to_json};
use super::words::{STALL, mode, seconds, word};
use super::{Global, interrupt};
use crate::error::{Code, Error, Result};
use crate::store::{Incoming, LoadRequest, Loaded, Owner, Store, TagName};
use crate::sys::stream::open_source;
use crate::units::Bytes;

/// Load templates from a stream of stencil save
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Where to read; without it standard input
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Permission bits of the files in a mount, in octal, in place of those that were saved
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<u32>,
    /// Owner of the files in a mount, by name or number, in place of the numbers that were saved
    #[arg(long, value_name = "U[:G]", value_parser = word::<Owner>)]
    owner: Option<Owner>,
    /// Leave out launch recipes: they are command lines that stencil clone runs
    #[arg(long)]
    no_recipes: bool,
    /// Leave out tags: none is made, none moved; what was loaded is found by its digest
    #[arg(long)]
    no_tags: bool,
    /// Give up when the stream is silent for so long; 0 waits without end
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
            let there = if template.existed { " (all there already)" } else { "" };
            writeln!(out, "{tags} {}{there}", template.digest)?;
            for moved in &template.moved {
                writeln!(out, "  tag {} moved: it pointed to {} before", moved.tag, moved.from.short())?;
            }
            if template.recipe {
                writeln!(out, "  with a launch recipe: look at it before stencil clone runs it")?;
            }
        }
        let Loaded { blocks, skipped_blocks, stored_bytes, repaired_blocks, stream_bytes, .. } = &self.loaded;
        let rate = Bytes::new((stream_bytes.get() as f64 / self.seconds.max(1e-6)) as u64);
        writeln!(
            out,
            "{blocks} blocks, of which {skipped_blocks} were there; {stored_bytes} added to the store; a stream of \
             {stream_bytes}, {:.1} s, {rate}/s",
            self.seconds
        )?;
        if *repaired_blocks > 0 {
            writeln!(out, "{repaired_blocks} damaged blocks were stored anew")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs it.
///
/// # Errors
/// As [`Incoming::open`] and [`Store::load`].
pub fn run(args: &LoadArgs, global: &Global) -> Result<Done> {
    let (file, name) = match args.input.as_deref().filter(|path| path.as_os_str() != "-") {
        Some(path) => (open(path)?, path),
        None if io::stdin().is_terminal() => {
            return Err(Error::usage("a stream of templates does not come from a terminal")
                .remedy("name a file with -i, or pipe it: ssh HOST stencil save T | stencil load"));
        }
        None => {
            let stdin = rustix::io::dup(io::stdin())
                .map_err(|e| Error::io("cannot read", "standard input", e.into()))?;
            (File::from(stdin), Path::new("standard input"))
        }
    };
    let start = Instant::now();
    // A stream that is none makes no store.
    let incoming = Incoming::open(file, name, Some(interrupt::flag()?), Some(args.stall_timeout))?;
    let store = match incoming.builds_on() {
        // A store that is made now has nothing to build on.
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
    const REMEDY: &str = "name a file that stencil save -o has written, or - for standard input";
    let fail = |e| {
        let error = Error::io("cannot open the stream", path, e);
        if error.code() == Code::NotFound { error.remedy(REMEDY) } else { error }
    };
    let file = open_source(path).map_err(fail)?;
    match file.metadata().map_err(fail)?.is_dir() {
        true => Err(Error::usage("a folder is no stream of stencil save").at(path).remedy(REMEDY)),
        false => Ok(file),
    }
}
