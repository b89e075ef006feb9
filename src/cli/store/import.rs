//! `stencil import`: imports files as a template.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::{STALL, mode, seconds, word};
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::error::{Error, Result};
use crate::store::{
    ChunkSize, Compression, FileKind, ImportFile, ImportFormat, ImportRequest, Imported, Owner, Source,
    Store, TagName,
};
use crate::units::Bytes;

/// Import a memory image as a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil import guest.ram web:1
  stencil import guest.ram web:1 --state guest.state --label os=debian12
  zstdcat guest.ram.zst | stencil import - web:1")]
pub struct ImportArgs {
    /// File, block device or pipe with the guest's memory; '-' reads standard input
    source: PathBuf,
    /// Name of the template [default tag: latest]
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<TagName>)]
    tag: TagName,
    /// Device state of the same VM, imported as the file 'state'
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Further file of the template; kind is ram (default), rom or blob
    #[arg(long = "file", value_name = "NAME=PATH[,kind=ram|rom|blob]", value_parser = word::<FileArg>)]
    files: Vec<FileArg>,
    /// Label of the template; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = word::<LabelArg>)]
    labels: Vec<LabelArg>,
    /// Format of the source: auto, raw or firecracker
    #[arg(long, default_value = "auto", value_parser = word::<ImportFormat>)]
    format: ImportFormat,
    /// Compression of blocks: lz4, zstd[:LEVEL] or none
    #[arg(long, default_value = "lz4", value_name = "CODEC", value_parser = word::<Compression>)]
    compression: Compression,
    /// Part of a 64 KiB block that can be decoded separately: 4k, 8k, 16k, 32k or 64k
    #[arg(long, default_value = "64k", value_name = "SIZE", value_parser = word::<ChunkSize>)]
    chunk_size: ChunkSize,
    /// Permission bits of the template's files in a mount, in octal
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<u32>,
    /// Owner of the template's files in a mount, by name or number
    #[arg(long, value_name = "U[:G]", value_parser = word::<Owner>)]
    owner: Option<Owner>,
    /// Fail if a pipe delivers no data for this time; 0 waits without limit
    #[arg(long, value_name = "SECONDS", default_value = STALL, value_parser = seconds)]
    stall_timeout: Duration,
}

#[derive(Debug, Clone)]
struct FileArg(ImportFile);

impl FromStr for FileArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<FileArg> {
        let (name, rest) = text.split_once('=').filter(|(_, path)| !path.is_empty()).ok_or_else(|| {
            Error::usage(format!("invalid file '{text}': expected NAME=PATH"))
                .hint("write --file NAME=PATH[,kind=ram|rom|blob]")
        })?;
        let (path, kind) = match rest.rsplit_once(",kind=") {
            Some((path, kind)) => (path, kind.parse()?),
            None => (rest, FileKind::Ram),
        };
        Ok(FileArg(ImportFile { name: name.to_owned(), kind, source: source(path.into()) }))
    }
}

#[derive(Debug, Clone)]
struct LabelArg(String, String);

impl FromStr for LabelArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<LabelArg> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(LabelArg(key.to_owned(), value.to_owned())),
            _ => Err(Error::usage(format!("invalid label '{text}': expected KEY=VALUE"))
                .hint("write --label KEY=VALUE")),
        }
    }
}

fn source(path: PathBuf) -> Source {
    if path.as_os_str() == "-" { Source::Stdin } else { Source::Path(path) }
}

struct ImportReport {
    imported: Imported,
    seconds: f64,
}

impl Report for ImportReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Imported { digest, tag, files, existed, repaired_blocks, .. } = &self.imported;
        let size: Bytes = files.iter().map(|f| f.size).sum();
        let data: Bytes = files.iter().map(|f| f.data_bytes).sum();
        let rate = size.per_second(self.seconds);
        if let Some(tag) = tag {
            write!(out, "{tag} ")?;
        }
        writeln!(out, "{digest}")?;
        self.imported.moved.iter().try_for_each(|moved| writeln!(out, "{moved}"))?;
        let stored = match (existed, self.imported.stored_bytes) {
            (true, Bytes::ZERO) => "already stored".to_owned(),
            (_, bytes) => format!("{bytes} added to the store"),
        };
        writeln!(out, "{size}, of which {data} data; {stored}; {:.1} s, {rate}/s", self.seconds)?;
        if *repaired_blocks > 0 {
            let blocks = counted(*repaired_blocks, "damaged block", "damaged blocks");
            writeln!(out, "{blocks} repaired")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let mut value = to_json(&self.imported);
        value["seconds"] = self.seconds.into();
        value["warnings"] = to_json(&self.imported.warnings);
        value
    }
}

/// Runs `stencil import`.
///
/// # Errors
/// Same as [`Store::import`].
pub fn run(args: &ImportArgs, global: &Global) -> Result<Done> {
    let mut files =
        vec![ImportFile { name: "memory".into(), kind: FileKind::Ram, source: source(args.source.clone()) }];
    if let Some(state) = &args.state {
        files.push(ImportFile { name: "state".into(), kind: FileKind::Blob, source: source(state.clone()) });
    }
    files.extend(args.files.iter().map(|f| f.0.clone()));
    let mut request = ImportRequest::new(Some(args.tag.clone()), files);
    request.labels = args.labels.iter().map(|l| (l.0.clone(), l.1.clone())).collect::<BTreeMap<_, _>>();
    request.format = args.format;
    request.compression = args.compression;
    request.chunk_size = args.chunk_size;
    request.mode = args.mode;
    request.owner = args.owner.unwrap_or_default();
    // Invalid requests are rejected before a store is created.
    request.check()?;
    request.interrupt = Some(interrupt::flag()?);
    request.stall = Some(args.stall_timeout);
    let start = Instant::now();
    let store = Store::open_or_create(&global.store)?;
    let imported = store.import(request, &*global.progress())?;
    imported.warnings.iter().for_each(|warning| crate::print_line!("note: {warning}"));
    Ok(Done::report(ImportReport { imported, seconds: start.elapsed().as_secs_f64() }))
}
