//! `stencil capture`: a running QEMU becomes a template.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::output::{Done, Report, to_json};
use super::words::word;
use super::{Global, interrupt};
use crate::clones::capture::{Afterwards, Captured, Check, Finding, capture, check};
use crate::clones::vmm::shell_word;
use crate::error::{Code, Result};
use crate::shown::shown;
use crate::store::{Store, TagName};
use crate::units::Bytes;

/// Make a template of a running QEMU
///
/// Its RAM must be in memory-backend-file objects with share=on. The VM stands still while it is captured and is
/// afterwards as it was before.
///
/// Disks are files, qcow2 or raw. The VM runs again before they are read: until then it writes to an overlay beside each
/// image (IMAGE.stencil-…), which is committed into the image and removed at the end, also if the capture is killed.
/// QEMU must be able to open a file there; what an error calls left over must not be removed. qemu-img must be in PATH,
/// and the store needs room for a copy of each qcow2. With --pause or --quit the VM stands still until its disks are
/// read, and there is no overlay.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// The QMP socket of the QEMU
    #[arg(value_name = "SOCK")]
    socket: PathBuf,
    /// Name of the template; the tag is 'latest' unless given
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<TagName>, required_unless_present = "check")]
    tag: Option<TagName>,
    /// Capture nothing: name everything that stands against it, and print the command line of a VM without that
    ///
    /// Exits with 0 when the VM can be captured, and with 6 when it cannot. Nothing of the VM is changed.
    #[arg(long, conflicts_with_all = ["tag", "pause", "quit"])]
    check: bool,
    /// Leave the VM paused
    #[arg(long, conflicts_with = "quit")]
    pause: bool,
    /// End the VM
    #[arg(long)]
    quit: bool,
}

struct CaptureReport {
    captured: Captured,
    tag: TagName,
}

impl Report for CaptureReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Captured { imported, pause_seconds, cloned, state_bytes, vm, warnings } = &self.captured;
        writeln!(out, "{} {}", self.tag, imported.digest)?;
        let size: Bytes = imported.files.iter().filter(|f| f.kind.is_memory()).map(|f| f.size).sum();
        writeln!(
            out,
            "{size} of RAM, {state_bytes} of device state, {} added to the store",
            imported.stored_bytes
        )?;
        match pause_seconds {
            Some(pause) => {
                let how = if *cloned { ", its RAM file was cloned" } else { "" };
                writeln!(out, "the VM stood still for {:.0} ms{how}; it is {vm}", pause * 1000.0)?;
            }
            None => writeln!(out, "the VM: {vm}")?,
        }
        warnings.iter().try_for_each(|warning| writeln!(out, "note: {warning}"))
    }

    fn json(&self) -> Value {
        to_json(&self.captured)
    }
}

impl Report for Check {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Check { pid, can_be_captured, findings, directory, command } = self;
        let verdict = if *can_be_captured { "can be captured" } else { "cannot be captured as it is" };
        writeln!(out, "the VM of process {pid} {verdict}")?;
        for Finding { about, blocks, what, remedy } in findings {
            let word = if *blocks { "obstacle" } else { "note" };
            writeln!(out, "{word}: {about}: {}", shown(what))?;
            writeln!(out, "    {}", shown(remedy))?;
        }
        if command.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "the command line with all of this, to be run in {} when this VM has ended:",
            directory.display()
        )?;
        let mut words = command.iter();
        write!(out, "{}", words.next().map_or_else(String::new, |word| shell_word(word)))?;
        for word in words {
            // One option a line.
            let between = if word.starts_with('-') { " \\\n    " } else { " " };
            write!(out, "{between}{}", shell_word(word))?;
        }
        writeln!(out)
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs it.
///
/// # Errors
/// When the VM is none that clones can be made of, or something fails on the way.
pub fn run(args: &CaptureArgs, global: &Global) -> Result<Done> {
    let afterwards = match (args.pause, args.quit) {
        (true, _) => Afterwards::Pause,
        (_, true) => Afterwards::Quit,
        _ => Afterwards::AsBefore,
    };
    let Some(tag) = args.tag.clone().filter(|_| !args.check) else {
        let check = check(&args.socket)?;
        let code = if check.can_be_captured { 0 } else { Code::CheckFailed.exit_code() };
        return Ok(Done::report(check).exit_code(code));
    };
    let store = Store::open_or_create(&global.store)?;
    let interrupt = interrupt::flag()?;
    let captured = capture(&store, &args.socket, &tag, afterwards, interrupt, &*global.progress())?;
    Ok(Done::report(CaptureReport { captured, tag }))
}
