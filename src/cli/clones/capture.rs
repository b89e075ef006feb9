//! `stencil capture`: makes a template from a running QEMU or Firecracker.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::cli::{Global, interrupt};
use crate::clones::capture::{AfterCapture, Captured, Check, Finding, capture, check};
use crate::clones::vmm::shell_word;
use crate::error::{Code, Result};
use crate::sanitize::sanitize;
use crate::store::{Store, TagName};
use crate::units::Bytes;

/// Make a template from a running QEMU or Firecracker VM
///
/// The VM is paused during the capture and afterwards returns to its previous state.
///
/// QEMU: the RAM of the VM must be in memory-backend-file objects with share=on. Disks must be files in qcow2 or raw
/// format. The VM resumes before its disks are read: until then, the VM writes to an overlay beside each image
/// (IMAGE.stencil-…), which is committed into the image and removed at the end, also if the capture is killed. QEMU
/// must be able to open a file in that directory; do not remove an overlay that an error message reports as left over.
/// qemu-img must be in PATH, and the store needs space for a copy of each qcow2 image. With --pause or --quit, the VM
/// stays paused until its disks are read, and no overlay is made.
///
/// Firecracker writes a full snapshot to temporary files, then the VM resumes and the files are imported. The file
/// system of the store needs space for the memory and for the new blocks. A Firecracker in a jail, or of another user,
/// writes the snapshot to its working directory, which then needs the space for the memory. Disks are not part of the
/// template: a running VM with a writable disk can be captured only with --pause or --quit.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil capture /run/vm/qmp.sock --check
  stencil capture /run/vm/qmp.sock web:1 --quit
  stencil capture /run/vm/firecracker.sock web:1")]
pub struct CaptureArgs {
    /// QMP socket of QEMU, or API socket of Firecracker
    #[arg(value_name = "SOCK")]
    socket: PathBuf,
    /// Name of the template [default tag: latest]
    #[arg(value_name = "NAME[:TAG]", value_parser = word::<TagName>, required_unless_present = "check")]
    tag: Option<TagName>,
    /// Report the obstacles to a capture without capturing, and print a command line of QEMU that avoids them
    ///
    /// Exits with 0 if the VM can be captured, and with 6 if it cannot. The VM is not changed.
    #[arg(long, conflicts_with_all = ["tag", "pause", "quit"])]
    check: bool,
    /// Leave the VM paused after the capture
    #[arg(long, conflicts_with = "quit")]
    pause: bool,
    /// Quit the VM after the capture
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
        imported.moved.iter().try_for_each(|moved| writeln!(out, "{moved}"))?;
        let size: Bytes = imported.files.iter().filter(|f| f.kind.is_memory()).map(|f| f.size).sum();
        writeln!(
            out,
            "{size} of RAM, {state_bytes} of device state, {} added to the store",
            imported.stored_bytes
        )?;
        match pause_seconds {
            Some(pause) => {
                let how = if *cloned { ", its RAM file was cloned" } else { "" };
                writeln!(out, "the VM was paused for {:.0} ms{how}; it is {vm}", pause * 1000.0)?;
            }
            None => writeln!(out, "state of the VM: {vm}")?,
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
        let verdict =
            if *can_be_captured { "can be captured" } else { "cannot be captured in its present form" };
        writeln!(out, "the VM of process {pid} {verdict}")?;
        for Finding { about, blocks, what, remedy } in findings {
            let word = if *blocks { "obstacle" } else { "note" };
            writeln!(out, "{word}: {about}: {}", sanitize(what))?;
            writeln!(out, "    {}", sanitize(remedy))?;
        }
        if command.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "command line without these obstacles; run it in {} after this VM has exited:",
            directory.display()
        )?;
        let mut words = command.iter();
        write!(out, "{}", words.next().map_or_else(String::new, |word| shell_word(word)))?;
        for word in words {
            // One option on each line.
            let between = if word.starts_with('-') { " \\\n    " } else { " " };
            write!(out, "{between}{}", shell_word(word))?;
        }
        writeln!(out)
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil capture`.
///
/// # Errors
/// Returns an error if the VM cannot be captured or a step of the capture fails.
pub fn run(args: &CaptureArgs, global: &Global) -> Result<Done> {
    let afterwards = match (args.pause, args.quit) {
        (true, _) => AfterCapture::Pause,
        (_, true) => AfterCapture::Quit,
        _ => AfterCapture::AsBefore,
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
