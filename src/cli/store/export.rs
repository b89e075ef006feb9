//! `stencil export`: writes the files of a template as they were imported.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::cli::output::Done;
use crate::cli::value_parsers::{STALL, seconds};
use crate::cli::{Global, interrupt};
use crate::control::Lease;
use crate::error::{Error, Result};
use crate::store::{FileKind, Store, Target, Template, TemplateRef};
use crate::sys::files::stream::Sink;

/// Write the files of a template as they were imported
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil export web:1 memory.img
  stencil export web:1/state state.bin
  stencil export web:1 - | sha256sum")]
pub struct ExportArgs {
    /// T: the guest's memory, or all files if OUT is a directory; T/FILE: that file
    #[arg(value_name = "T[/FILE]")]
    what: String,
    /// New file, existing directory, or '-' for standard output
    out: PathBuf,
    /// Write zero pages of guest memory as holes; zero pages of other files always become holes
    #[arg(long)]
    sparse: bool,
    /// Replace files that exist
    #[arg(long)]
    force: bool,
    /// Fail if no process opens a named pipe for reading within this time; 0 waits without limit
    #[arg(long, value_name = "SECONDS", default_value = STALL, value_parser = seconds)]
    stall_timeout: Duration,
}

/// Runs `stencil export`.
///
/// # Errors
/// Returns `Code::NotFound` if the template or the file does not exist, `Code::Damage` if the file is damaged, and an
/// error if OUT cannot be written, or exists and `--force` is missing.
pub fn run(args: &ExportArgs, global: &Global) -> Result<Done> {
    let (reference, file) = match args.what.split_once('/') {
        Some((reference, file)) => (reference, Some(file)),
        None => (args.what.as_str(), None),
    };
    let reference: TemplateRef = reference.parse()?;
    let store = Store::open(&global.store)?;
    let (digest, _lease) = Lease::of(&store, &reference, "export")?;
    let template = store.template(&digest)?;
    let progress = global.progress();
    let stop = interrupt::flag()?;
    if args.out.as_os_str() == "-" {
        if global.json {
            return Err(Error::usage("cannot write both the file and a JSON object to standard output")
                .hint("omit --json, or name an output file"));
        }
        let file = choose(&template, file)?;
        let mut stdout = Sink::stdout(Some(&stop))?;
        template.export_stream(file, Path::new("standard output"), &mut stdout, &stop, &*progress)?;
        return Ok(Done::silent());
    }
    let files: Vec<(usize, PathBuf)> = if args.out.is_dir() {
        let files = match file {
            Some(_) => vec![choose(&template, file)?],
            None => (0..template.files().len()).collect(),
        };
        files.into_iter().map(|file| (file, args.out.join(&template.files()[file].name))).collect()
    } else {
        vec![(choose(&template, file)?, args.out.clone())]
    };
    // All files are checked before the first one is written.
    files.iter().try_for_each(|(_, out)| Target::check(out, args.force))?;
    for (file, out) in &files {
        // A VMM may take a hole in a memory file for a page of another file (a diff), and a copy may lose holes.
        let sparse = args.sparse || template.files()[*file].kind != FileKind::Ram;
        template.export_file(*file, (out, args.force, sparse), (&stop, args.stall_timeout), &*progress)?;
    }
    Ok(Done::silent())
}

/// Returns the index of the named file; without a name, of the only file or of the guest's memory.
fn choose(template: &Template, name: Option<&str>) -> Result<usize> {
    let files: Vec<&str> = template.files().iter().map(|f| f.name.as_str()).collect();
    let found = match name {
        Some(name) => template.file(name),
        None if files.len() == 1 => Some(0),
        None => template.roles()?.memory.and_then(|name| template.file(&name)),
    };
    found.ok_or_else(|| {
        let what = name.map_or("missing file name".to_owned(), |n| format!("no file '{n}' in the template"));
        Error::not_found(what).hint(format!("name one of these files as T/FILE: {}", files.join(", ")))
    })
}
