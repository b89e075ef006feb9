//! `stencil args`: prints the arguments that another VMM needs to map a template.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::clones::launch;
use crate::clones::vmm::{Vmm, VmmArguments, paste};
use crate::error::{Error, Result};
use crate::store::{Digest, Store, Target, TemplateRef};

/// Print the arguments for another VMM to run guests from a template
///
/// The store must be mounted. Notes about the output are written to standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil args web:1 --vmm qemu
  stencil args web:1 --vmm firecracker > snapshot-load.json
  stencil args web:1 --vmm cloud-hypervisor --dir /run/web-7")]
pub struct VmmArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Output format: qemu (command line), firecracker (body of snapshot/load), cloud-hypervisor (command line and
    /// files in --dir), libvirt (domain) or kata (script or commands)
    #[arg(long, value_name = "VMM", value_parser = word::<Vmm>)]
    vmm: Vmm,
    /// Existing directory for config.json and state.json of one Cloud Hypervisor clone
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Replace the files in --dir if they exist
    #[arg(long, requires = "dir")]
    force: bool,
}

#[derive(Serialize)]
struct Pasted {
    vmm: &'static str,
    reference: String,
    digest: Digest,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    argv: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<PathBuf>,
    notes: Vec<String>,
}

impl Report for Pasted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.text)
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil args`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist or its store is not mounted, `Code::Usage` if the VMM does
/// not support the template, and an error if a file in `--dir` cannot be written, or exists and `--force` is missing.
pub fn run(args: &VmmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (target, _lease) = launch::Target::find(&store, &args.template, "args")?;
    let mut served = target.served(&store)?;
    served.read_documents(&store.template(&target.digest)?, args.vmm.documents())?;
    served.clone_dir = args.dir.as_deref().map(|dir| clone_directory(dir, args.vmm)).transpose()?;
    let VmmArguments { text, argv, body, files, notes } = paste(args.vmm, &served)?;
    // All files are checked before the first one is written.
    files.iter().try_for_each(|(path, _)| Target::check(path, args.force))?;
    for (path, bytes) in &files {
        // `Target` would follow a symbolic link, and the directory may belong to the user of the VMM.
        if args.force
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::io("cannot replace", path, error));
        }
        let mut file = Target::create(path, false)?;
        file.file().write_all(bytes).map_err(|e| Error::io("cannot write", path, e))?;
        file.publish()?;
    }
    if !global.quiet && !global.json {
        notes.iter().for_each(|note| crate::print_line!("note: {note}"));
    }
    let report = Pasted {
        vmm: args.vmm.name(),
        reference: served.name,
        digest: target.digest,
        text,
        argv,
        body,
        files: files.into_iter().map(|(path, _)| path).collect(),
        notes,
    };
    Ok(Done::report(report))
}

/// Returns the absolute path of `--dir`.
fn clone_directory(dir: &Path, vmm: Vmm) -> Result<String> {
    if vmm.documents().is_empty() {
        return Err(Error::usage(format!("--dir has no effect with --vmm {}", vmm.name())).hint("omit --dir"));
    }
    let absolute = fs::canonicalize(dir).map_err(|e| {
        Error::io("cannot access directory", dir, e).hint("create the directory, another one for each clone")
    })?;
    absolute.into_os_string().into_string().map_err(|_| {
        Error::usage("invalid directory: the path is not UTF-8").at(dir).hint("choose another directory")
    })
}
