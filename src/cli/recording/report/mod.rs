//! `stencil report`: makes a page of a recording, with pictures and tables.

mod figures;
mod growth;
mod html;
mod page;
mod plot;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use self::figures::{Comparison, Figures};
use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::clones::recording::Recording;
use crate::error::{Error, Result};
use crate::sanitize::{path_text, sanitize};
use crate::store::Target;

/// Make a page with pictures and tables of a recording
///
/// The page is one HTML file that loads nothing from elsewhere. With --json, the same figures are printed, and the page is
/// written only with --output.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil report web.rec
  stencil report web.rec --output /srv/www/web.html --force
  stencil report --compare before.rec after.rec")]
pub struct ReportArgs {
    /// The recording, written by 'stencil record'
    file: PathBuf,
    /// Show this earlier recording beside it
    #[arg(long, value_name = "BEFORE")]
    compare: Option<PathBuf>,
    /// The page [default: the name of the recording with the extension html, in the current directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the page if it exists
    #[arg(long)]
    force: bool,
}

/// The figures of the page, and where it is.
#[derive(Debug)]
struct Reported {
    figures: Subject,
    page: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Subject {
    One(Box<Figures>),
    Two(Box<Comparison>),
}

/// Reads the recordings and writes the page.
///
/// # Errors
/// Returns an error if a recording cannot be read or has no sample, or if the page cannot be written or exists and
/// `--force` is missing.
pub fn run(args: &ReportArgs, global: &Global) -> Result<Done> {
    let page = match (&args.output, global.json) {
        (Some(output), _) => Some(output.clone()),
        (None, true) => None,
        (None, false) => {
            let name = args.file.file_name().ok_or_else(|| {
                Error::usage("the path of the recording has no file name").at(&args.file).hint("name a file")
            })?;
            Some(PathBuf::from(name).with_extension("html"))
        }
    };
    if let Some(page) = &page {
        Target::check(page, args.force)?;
        let recordings = [Some(&args.file), args.compare.as_ref()];
        if recordings.into_iter().flatten().any(|file| is_same(file, page)) {
            return Err(Error::usage("the page would replace the recording")
                .at(page)
                .hint("name another file with --output"));
        }
    }
    let figures = Figures::of(&Recording::open(&args.file)?)?;
    let figures = match &args.compare {
        None => Subject::One(Box::new(figures)),
        Some(before) => {
            let before = Figures::of(&Recording::open(before)?)?;
            Subject::Two(Box::new(Comparison::new(before, figures)))
        }
    };
    if let Some(page) = &page {
        let text = match &figures {
            Subject::One(figures) => page::page(figures)?,
            Subject::Two(both) => page::comparison(both)?,
        };
        let mut target = Target::create(page, args.force)?;
        target.file().write_all(text.as_bytes()).map_err(|e| Error::io("cannot write the page", page, e))?;
        target.publish()?;
    }
    Ok(Done::report(Reported { figures, page }))
}

/// Returns true if both paths lead to one file.
fn is_same(one: &Path, other: &Path) -> bool {
    matches!((std::fs::canonicalize(one), std::fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

impl Report for Reported {
    fn json(&self) -> Value {
        let mut json = to_json(&self.figures);
        json["page"] = self.page.as_deref().map_or(Value::Null, |page| path_text(page).into());
        json
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.page {
            Some(page) => writeln!(out, "wrote {}", sanitize(&path_text(page))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
