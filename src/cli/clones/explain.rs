//! `stencil explain`: maps a memory object in the same way as QEMU, and reports the mapping.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use crate::cli::output::to_json;
use crate::cli::{Done, Global, Report};
use crate::error::Result;
use crate::memory::{Backend, Note, Observed, Options, Role, observe};
use crate::units::Bytes;

/// Map a memory object as QEMU would and report the mapping, or QEMU's reason to reject the object
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil explain memory-backend-file,id=ram,size=1G,share=off,mem-path=/srv/templates/web/1/memory
  stencil explain \"$(cat object.json)\"")]
pub struct ExplainArgs {
    /// Argument of QEMU's -object: memory-backend-file,id=…,size=…,mem-path=… or the JSON form
    #[arg(value_name = "OBJECT")]
    object: String,
}

#[derive(Debug, Serialize)]
struct Explanation {
    verdict: &'static str,
    object: &'static str,
    id: String,
    role: Role,
    meaning: &'static str,
    size_bytes: Bytes,
    map: Observed,
    notes: Vec<Note>,
}

/// Maps the object, inspects the mapping, and unmaps it. The file is not changed.
///
/// # Errors
/// Returns QEMU's own error text if QEMU would reject the object, and `Code::Usage` if Stencil rejects the object.
pub fn run(args: &ExplainArgs, _global: &Global) -> Result<Done> {
    let backend = Backend::trial(&Options::parse(&args.object)?.plan()?)?;
    let map = observe(backend.address_range().start)?;
    Ok(Done::report(Explanation {
        verdict: "accepted",
        object: backend.plan().type_name,
        id: backend.plan().id.clone(),
        role: backend.role(),
        meaning: meaning(&backend),
        size_bytes: backend.len(),
        map,
        notes: backend.notes().to_vec(),
    }))
}

fn meaning(backend: &Backend) -> &'static str {
    use crate::memory::Sharing::{Private, Shared};
    let file = backend.plan().has_file();
    match (backend.role(), backend.sharing(), file) {
        (Role::Template, ..) => {
            "writable RAM from a read-only file: a write copies its page, all other pages are shared"
        }
        (Role::Rom, ..) => "read-only memory, shared by all processes that map the file",
        (Role::Ram, Shared, true) => {
            "writable RAM: every write changes the file (for making a template, not for running clones)"
        }
        (Role::Ram, Private, true) => {
            "writable RAM: a write copies its page, although the file is open for writing"
        }
        (Role::Ram, Shared, false) => "writable RAM in a memfd, without a file: independent of any template",
        (Role::Ram, Private, false) => "writable RAM without a file: nothing is shared",
    }
}

impl Report for Explanation {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} '{}', {}: {}", self.object, self.id, self.size_bytes, self.meaning)?;
        writeln!(out, "maps     {}", self.map.line)?;
        writeln!(out, "VmFlags  {}", self.map.vm_flags.join(" "))?;
        writeln!(
            out,
            "in RAM   {} mapped, {} of them copied, {} by 2 MiB pages",
            self.map.resident_bytes, self.map.anonymous_bytes, self.map.pmd_mapped_bytes
        )?;
        for note in &self.notes {
            match note.bytes {
                Some(bytes) => writeln!(out, "note     {} ({bytes})", note.message)?,
                None => writeln!(out, "note     {}", note.message)?,
            }
            if let Some(remedy) = &note.remedy {
                writeln!(out, "         {remedy}")?;
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}
