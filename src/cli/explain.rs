//! `stencil explain`: maps as QEMU would, and says what it got.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use super::output::to_json;
use super::{Done, Global, Report};
use crate::error::Result;
use crate::memory::{Backend, Note, Observed, Options, Role, observe};
use crate::units::Bytes;

/// Maps a memory object as QEMU would and says what it got, or why QEMU would refuse it
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// What follows QEMU's -object: memory-backend-file,id=…,size=…,mem-path=… or the JSON form
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

/// Maps, looks, unmaps; the file is afterwards as it was before.
///
/// # Errors
/// QEMU's words where QEMU would refuse the object, and our own refusals.
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
            "writable RAM from a read-only file: a write copies its page, the rest is shared by all"
        }
        (Role::Rom, ..) => "read-only memory, shared by all who map the file",
        (Role::Ram, Shared, true) => {
            "writable RAM: every write changes the file (this is how a template is made)"
        }
        (Role::Ram, Private, true) => {
            "writable RAM: a write copies its page, though the file is open for writing"
        }
        (Role::Ram, Shared, false) => "writable RAM without a file, in a memfd: nothing of a template",
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
            "in RAM   {} mapped, {} of it copied, {} by 2 MiB pages",
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
