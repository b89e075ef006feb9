//! `stencil import`: imports files as a template.

use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::{Label, STALL, mode, seconds, word};
use crate::cli::{Global, interrupt};
use crate::clones::counted;
use crate::control::Lease;
use crate::error::{Error, Result};
use crate::store::{
    Base, Compression, FileKind, Folder, ImportFile, ImportFormat, ImportRequest, Imported, Owner,
    Recognized, Snapshot, Source, Store, TagName, TemplateRef,
};
use crate::units::{Bytes, PAGE_SIZE};

/// Import a memory image as a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil import guest.ram web:1
  stencil import guest.ram web:1 --state guest.state --label os=debian12
  stencil import snapshots/2024-05-01 web:1")]
pub struct ImportArgs {
    /// File, block device or pipe with the guest's memory, '-' for standard input, or a VMM's snapshot directory
    source: PathBuf,
    /// Name of the template [default tag: latest]
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<NameArg>)]
    name: NameArg,
    /// Device state of the same VM, imported as the file 'state'
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Further file of the template; kind is ram (default), rom or blob
    #[arg(long = "file", value_name = "NAME=PATH[,kind=ram|rom|blob]", value_parser = word::<FileArg>)]
    files: Vec<FileArg>,
    /// Label of the template; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = word::<Label>)]
    labels: Vec<Label>,
    /// Format of the source: auto, raw or firecracker
    #[arg(long, default_value = "auto", value_parser = word::<ImportFormat>)]
    format: ImportFormat,
    /// The source is a diff snapshot: its holes stand for the pages of the memory of this template
    #[arg(long, value_name = "T", value_parser = word::<TemplateRef>)]
    base: Option<TemplateRef>,
    /// Accept a diff without any hole
    #[arg(long, requires = "base")]
    all_pages: bool,
    /// Compression of blocks: lz4, zstd[:LEVEL] or none
    #[arg(long, default_value = "lz4", value_name = "CODEC", value_parser = word::<Compression>)]
    compression: Compression,
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

/// A tag, and whether the user has written the part after the colon.
#[derive(Debug, Clone)]
struct NameArg {
    tag: TagName,
    is_explicit: bool,
}

impl FromStr for NameArg {
    type Err = Error;

    fn from_str(text: &str) -> Result<NameArg> {
        Ok(NameArg { tag: text.parse()?, is_explicit: text.contains(':') })
    }
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

fn source(path: PathBuf) -> Source {
    if path.as_os_str() == "-" { Source::Stdin } else { Source::Path(path) }
}

/// The import of one template: a request, and how the files of a directory were recognized.
struct Job {
    request: ImportRequest,
    recognized: Option<Recognized>,
}

/// Work of the command: one template, or one for each directory in the source.
enum Plan {
    One(Box<Job>),
    Each(Vec<(String, TagName)>),
}

impl ImportArgs {
    fn plan(&self) -> Result<Plan> {
        let files: Vec<ImportFile> = self.files.iter().map(|f| f.0.clone()).collect();
        if !self.source.is_dir() {
            let file = |name: &str, kind, path: &PathBuf| ImportFile {
                name: name.into(),
                kind,
                source: source(path.clone()),
            };
            let memory = file("memory", FileKind::Ram, &self.source);
            let state = self.state.as_ref().map(|path| file("state", FileKind::Blob, path));
            let files = [memory].into_iter().chain(state).chain(files).collect();
            let request = self.request(&self.name.tag, files, self.format);
            return Ok(Plan::One(Job { request, recognized: None }.into()));
        }
        let refuse = |why: &str, hint: &str| Err(Error::usage(why).at(&self.source).hint(hint));
        if self.state.is_some() {
            return refuse("--state is given, but the source is a directory", "omit --state");
        }
        let folders = match Folder::open(&self.source, &files)? {
            Folder::Snapshot(snapshot) => {
                return Ok(Plan::One(self.snapshot(&self.name.tag, snapshot)?.into()));
            }
            Folder::Folders(folders) => folders,
        };
        if self.name.is_explicit {
            return refuse(
                "a tag is given, but the source is a directory of directories, whose names become the tags",
                "give the name without a tag, or import one of the directories",
            );
        }
        if !files.is_empty() || self.base.is_some() {
            return refuse(
                "--file or --base is given, but the source is a directory of directories",
                "import each directory on its own",
            );
        }
        let tag = |folder: String| {
            let path = self.source.join(&folder);
            match TagName::new(self.name.tag.name(), &folder) {
                Ok(tag) => Ok((folder, tag)),
                Err(error) => Err(error
                    .at(path)
                    .hint("rename the directory, whose name becomes the tag of the template")),
            }
        };
        let each = folders.into_iter().map(tag).collect::<Result<Vec<_>>>()?;
        // All directories are checked before the first one is imported.
        each.iter().try_for_each(|(folder, tag)| self.folder(folder, tag).map(drop))?;
        Ok(Plan::Each(each))
    }

    /// Opens a directory in the source, which must have one snapshot.
    fn folder(&self, name: &str, tag: &TagName) -> Result<Job> {
        match Folder::open_below(&self.source, name)? {
            Folder::Snapshot(snapshot) => self.snapshot(tag, snapshot),
            Folder::Folders(_) => Err(Error::usage("expected a snapshot, found a directory of directories")
                .at(self.source.join(name))
                .hint("import this directory on its own")),
        }
    }

    fn snapshot(&self, tag: &TagName, snapshot: Snapshot) -> Result<Job> {
        let format = match (self.format, snapshot.format) {
            (ImportFormat::Auto, found) => found,
            (ImportFormat::Firecracker, ImportFormat::Auto) => {
                return Err(Error::usage(format!(
                    "no Firecracker snapshot: the directory has a {}",
                    snapshot.recognized
                ))
                .at(&self.source)
                .hint("omit --format"));
            }
            (given, _) => given,
        };
        if self.base.is_some() && snapshot.recognized.vmm != "firecracker" {
            return Err(Error::usage(format!(
                "no diff snapshot: the directory has a {}",
                snapshot.recognized
            ))
            .at(&self.source)
            .hint("omit --base: only Firecracker writes diff snapshots"));
        }
        let files = snapshot.files.into_iter().chain(self.files.iter().map(|f| f.0.clone())).collect();
        let request = self.request(tag, files, format);
        // Invalid requests are rejected before a store is created.
        request.check()?;
        Ok(Job { request, recognized: Some(snapshot.recognized) })
    }

    fn request(&self, tag: &TagName, files: Vec<ImportFile>, format: ImportFormat) -> ImportRequest {
        let mut request = ImportRequest::new(Some(tag.clone()), files);
        request.labels = Label::map(&self.labels);
        request.format = format;
        request.compression = self.compression;
        request.mode = self.mode;
        request.owner = self.owner.unwrap_or_default();
        request.stall = Some(self.stall_timeout);
        request
    }
}

struct ImportReport {
    recognized: Option<Recognized>,
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
        self.recognized.iter().try_for_each(|recognized| writeln!(out, "{recognized}"))?;
        let stored = match (existed, self.imported.stored_bytes) {
            (true, Bytes::ZERO) => "already stored".to_owned(),
            (_, bytes) => format!("{bytes} added to the store"),
        };
        writeln!(out, "{size}, of which {data} data; {stored}; {:.1} s, {rate}/s", self.seconds)?;
        if *repaired_blocks > 0 {
            let blocks = counted(*repaired_blocks, "damaged block", "damaged blocks");
            writeln!(out, "{blocks} repaired")?;
        }
        if let Some(changed) = self.imported.changed_pages {
            let memory: Bytes = files.iter().filter(|f| f.kind == FileKind::Ram).map(|f| f.size).sum();
            writeln!(out, "{} of {} pages changed", changed.get(), memory.get() / PAGE_SIZE)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let mut value = to_json(&self.imported);
        value["recognized"] = to_json(&self.recognized);
        value["changed_pages"] = to_json(&self.imported.changed_pages);
        value["seconds"] = self.seconds.into();
        value["warnings"] = to_json(&self.imported.warnings);
        value
    }
}

/// The templates that an import of a directory of snapshot directories has made.
struct EachReport(Vec<ImportReport>);

impl Report for EachReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        self.0.iter().try_for_each(|report| report.text(out))
    }

    fn json(&self) -> Value {
        json!({"templates": self.0.iter().map(Report::json).collect::<Vec<_>>()})
    }
}

/// Runs `stencil import`.
///
/// # Errors
/// Same as [`Store::import`] and [`Folder::open`].
pub fn run(args: &ImportArgs, global: &Global) -> Result<Done> {
    let plan = args.plan()?;
    if let Plan::One(job) = &plan {
        job.request.check()?;
    }
    let interrupt = interrupt::flag()?;
    let (store, base) = match &args.base {
        Some(reference) => {
            let store = Store::open(&global.store)?;
            let base = Lease::of(&store, reference, "import")?;
            (store, Some(base))
        }
        None => (Store::open_or_create(&global.store)?, None),
    };
    let import = |job: Job| {
        let Job { mut request, recognized } = job;
        request.base = base.as_ref().map(|(digest, _)| Base { digest: *digest, all_pages: args.all_pages });
        request.interrupt = Some(Arc::clone(&interrupt));
        let start = Instant::now();
        let imported = store.import(request, &*global.progress())?;
        imported.warnings.iter().for_each(|warning| crate::print_line!("note: {warning}"));
        Ok(ImportReport { recognized, imported, seconds: start.elapsed().as_secs_f64() })
    };
    let each = match plan {
        Plan::One(job) => return import(*job).map(Done::report),
        Plan::Each(each) => each,
    };
    let mut done = Vec::new();
    for (folder, tag) in each {
        // The directory is opened again: many directories have more files than a process may have open.
        match args.folder(&folder, &tag).and_then(&import) {
            Ok(report) => done.push(report),
            Err(error) if done.is_empty() => return Err(error),
            Err(error) => return Ok(Done::report(EachReport(done)).but_failed(error)),
        }
    }
    Ok(Done::report(EachReport(done)))
}
