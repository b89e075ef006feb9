//! `stencil args`: prints the arguments that another VMM needs to map a template.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::clones::launch::Target;
use crate::clones::vmm::{Vmm, VmmArguments, paste};
use crate::error::Result;
use crate::store::{Digest, Store, TemplateRef};

/// Print the arguments for another VMM to run guests from a template
///
/// The store must be mounted. Notes about the output are written to standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil args web:1 --vmm qemu
  stencil args web:1 --vmm firecracker > snapshot-load.json
  stencil args web:1 --vmm libvirt > web.xml")]
pub struct VmmArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Output format: qemu (command line), firecracker (body of snapshot/load), libvirt (domain) or kata (script)
    #[arg(long, value_name = "VMM", value_parser = word::<Vmm>)]
    vmm: Vmm,
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
/// Returns `Code::NotFound` if the template does not exist or its store is not mounted, and `Code::Usage` if the VMM
/// does not support the template.
pub fn run(args: &VmmArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (target, _lease) = Target::find(&store, &args.template, "args")?;
    let served = target.served(&store)?;
    let VmmArguments { text, argv, body, notes } = paste(args.vmm, &served)?;
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
        notes,
    };
    Ok(Done::report(report))
}
