//! `stencil save`: writes templates as one stream.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::fs::{FileType, OFlags, fcntl_getfl, major, minor};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::{STALL, seconds, word};
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::control::Lease;
use crate::error::{Error, Result};
use crate::store::{Digest, SaveRequest, Saved, Store, TagName, Target, TemplateRef};
use crate::sys::files::stream::Sink;

/// Write templates as a stream for `stencil load` on another host
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil save web:1 -o web.stencil
  stencil save web:1 | ssh host stencil load
  stencil save web:2 --without web:1 -o update.stencil")]
pub struct SaveArgs {
    /// Tag (NAME[:TAG]), saved with its template, or a digest, saved with all its tags
    #[arg(value_name = "T", required = true, value_parser = word::<TemplateRef>)]
    templates: Vec<TemplateRef>,
    /// File to write instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    /// Omit the blocks of a template that the other store already has; may be repeated
    #[arg(long, value_name = "T", value_parser = word::<TemplateRef>)]
    without: Vec<TemplateRef>,
    /// Fail if no process opens a named pipe for reading within this time; 0 waits without limit
    #[arg(long, value_name = "SECONDS", default_value = STALL, value_parser = seconds)]
    stall_timeout: Duration,
}

#[derive(Serialize)]
struct SaveReport {
    #[serde(serialize_with = "crate::sanitize::path")]
    output: PathBuf,
    #[serde(flatten)]
    saved: Saved,
    seconds: f64,
}

impl Report for SaveReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for template in &self.saved.templates {
            let tags: Vec<String> = template.tags.iter().map(TagName::to_string).collect();
            writeln!(
                out,
                "{} {}",
                if tags.is_empty() { "-".into() } else { tags.join(" ") },
                template.digest
            )?;
        }
        let Saved { blocks, block_bytes, stream_bytes, .. } = &self.saved;
        let blocks = counted(*blocks, "block", "blocks");
        writeln!(
            out,
            "{blocks} ({block_bytes}) in a stream of {stream_bytes}: {}; {:.1} s",
            self.output.display(),
            self.seconds
        )
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil save`.
///
/// # Errors
/// Returns `Code::NotFound` if a template does not exist, `Code::Damage` if a template is damaged, and an error if the
/// stream cannot be written, or the file exists and `--force` is missing.
pub fn run(args: &SaveArgs, global: &Global) -> Result<Done> {
    let output = args.output.as_deref().filter(|path| path.as_os_str() != "-");
    if output.is_none() {
        if global.json {
            return Err(Error::usage("cannot write both the stream and a JSON object to standard output")
                .hint("omit --json, or name a file with -o"));
        }
        if is_closed(io::stdout())? {
            return Err(Error::usage("standard output is closed: the stream would be lost")
                .hint("name a file with -o, or use a pipe: stencil save T | ssh HOST stencil load"));
        }
        if io::stdout().is_terminal() {
            return Err(Error::usage("refusing to write a stream of templates to a terminal")
                .hint("name a file with -o, or use a pipe: stencil save T | ssh HOST stencil load"));
        }
    }
    let start = Instant::now();
    let store = Store::open(&global.store)?;
    let mut leases = Vec::new();
    let mut lease = |reference: &TemplateRef| -> Result<Digest> {
        let (digest, lease) = Lease::of(&store, reference, "save")?;
        leases.push(lease);
        Ok(digest)
    };
    let mut request = SaveRequest::default();
    for reference in &args.templates {
        let digest = lease(reference)?;
        let tags = match reference {
            TemplateRef::Tag(tag) => vec![tag.clone()],
            _ => tags_of(&store, &digest)?,
        };
        request.templates.push((digest, tags));
    }
    for reference in &args.without {
        request.without.push(lease(reference)?);
    }
    let progress = global.progress();
    let Some(path) = output else {
        // No signal handler here: a signal must end a write that blocks on the reader, and no file is left to remove.
        store.save(&request, (&mut Sink::stdout(None)?, Path::new("standard output")), &*progress)?;
        return Ok(Done::silent());
    };
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let saved = match fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => {
            return Err(Error::usage("cannot write the stream: the path is a directory")
                .at(&path)
                .hint("name a file in the directory"));
        }
        Ok(meta) if !meta.is_file() => {
            let mut sink = Sink::open(&path, Some(args.stall_timeout), None)?;
            store.save(&request, (&mut sink, &path), &*progress)?
        }
        _ => {
            request.interrupt = Some(interrupt::flag()?);
            let mut target = Target::create(&path, args.force)?;
            let saved = store.save(&request, (target.file(), &path), &*progress)?;
            target.publish()?;
            saved
        }
    };
    Ok(Done::report(SaveReport { output: path, saved, seconds: start.elapsed().as_secs_f64() }))
}

/// Returns all tags of a template.
fn tags_of(store: &Store, digest: &Digest) -> Result<Vec<TagName>> {
    let tags = store.tags()?.into_iter().filter(|t| t.digest == *digest);
    tags.map(|t| TagName::new(&t.name, &t.tag)).collect()
}

/// Returns true if standard output was closed. Rust's runtime then opens `/dev/null` in its place for reading and
/// writing, while `>/dev/null` opens it for writing only.
fn is_closed(stdout: impl AsFd) -> Result<bool> {
    let fail = |e: Errno| Error::failed("cannot inspect standard output").because(e.into());
    let stat = rustix::fs::fstat(&stdout).map_err(fail)?;
    let null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3);
    Ok(null && fcntl_getfl(stdout).map_err(fail)? & OFlags::ACCMODE == OFlags::RDWR)
}
