//! `stencil logs`: prints the output of a clone.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{slice, thread};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::output::{Done, Report};
use crate::clones::registry::process_tree::ProcessTrees;
use crate::clones::registry::{self, API_SOCKET, Entry, Kind, LOG, QMP_SOCKET, SERIAL_LOG, VMM_LOG};
use crate::error::{Error, Result};
use crate::sys::poll::Patient;

/// Interval at which a followed log is read again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Print the output of a clone and of its guest's serial port
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil logs c1a2b3c4
  stencil logs -f c1a2b3c4
  stencil logs c1a2b3c4 --json")]
pub struct LogsArgs {
    /// Id of the clone
    #[arg(value_name = "ID")]
    id: String,
    /// Print further output as it is written, until the clone has ended
    #[arg(short, long)]
    follow: bool,
}

struct LogsReport {
    id: String,
    log: String,
    serial: Option<String>,
    /// Sockets of character devices in the clone's directory, whose output is not recorded.
    sockets: Vec<PathBuf>,
}

impl Report for LogsReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.log.as_bytes())?;
        out.write_all(self.serial.as_deref().unwrap_or_default().as_bytes())?;
        for socket in &self.sockets {
            let name = socket.file_name().unwrap_or_default().display();
            writeln!(
                out,
                "{name} is a socket without a log; to connect: socat -,rawer UNIX-CONNECT:{}",
                socket.display()
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        json!({"id": self.id, "log": self.log, "serial": self.serial, "sockets": self.sockets})
    }
}

/// Runs `stencil logs`.
///
/// # Errors
/// Returns `Code::NotFound` if the clone does not exist, and an error if its log cannot be read.
pub fn run(args: &LogsArgs, global: &Global) -> Result<Done> {
    let entry = registry::find(&args.id)?;
    if args.follow && global.json {
        return Err(Error::usage("cannot follow a log in one JSON object").hint("omit --json or --follow"));
    }
    if args.follow {
        return follow(&entry);
    }
    let text = |name: &str| {
        let path = entry.dir.join(name);
        let failed = |e| {
            let remedy = format!("read the end of the file: tail {}", path.display());
            Error::io("cannot read the log of a clone", &path, e).hint(remedy)
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok::<_, Error>(entry.read_file(name).map_err(failed)?.map(text))
    };
    let log = match entry.kind {
        Kind::Simulated => simulated_log(&entry)?,
        _ => text(LOG)?.unwrap_or_default() + &text(VMM_LOG)?.unwrap_or_default(),
    };
    let serial = text(SERIAL_LOG)?;
    Ok(Done::report(LogsReport { log, serial, sockets: sockets(&entry.dir)?, id: entry.id }))
}

/// Returns the log of a simulated clone, which is empty while the clone is launched.
fn simulated_log(entry: &Entry) -> Result<String> {
    let failed = |e| Error::io("cannot read the log of a clone", &entry.dir, e);
    if entry.is_launching() { Ok(String::new()) } else { registry::simulated_log(entry).map_err(failed) }
}

/// Prints the logs as they grow, until the clone has ended.
fn follow(entry: &Entry) -> Result<Done> {
    entry.expect_ours()?;
    let fail = |e| Error::io("cannot print the log of a clone", &entry.dir, e);
    let mut logs = [(LOG, None), (VMM_LOG, None), (SERIAL_LOG, None)];
    let mut out = Patient(io::stdout());
    if entry.kind == Kind::Simulated {
        while entry.is_launching() {
            thread::sleep(POLL_INTERVAL);
        }
        match out.write_all(simulated_log(entry)?.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Done::silent()),
            written => written.map_err(fail)?,
        }
    }
    loop {
        // The end of the clone is detected before the logs are read, so that the last output is printed.
        let runs = runs(&entry.id);
        for (name, log) in &mut logs {
            if log.is_none() {
                *log = entry.open_file(name).map_err(fail)?;
            }
            let Some(log) = log else { continue };
            match io::copy(log, &mut out) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Done::silent()),
                copied => copied.map_err(fail)?,
            };
        }
        if !runs {
            return Ok(Done::silent());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns true while a process of the clone lives or may be started. A stopped clone has no record.
fn runs(id: &str) -> bool {
    registry::find(id).is_ok_and(|entry| {
        let has_processes = || !ProcessTrees::scan(slice::from_ref(&entry)).of(&entry).is_empty();
        entry.is_launching() || entry.is_alive() || has_processes()
    })
}

/// Usual name of the socket of a vsock device. Unlike the other sockets of a clone, this socket carries no output of
/// the guest.
const VSOCK: &str = "vsock.sock";

/// Returns the sockets of serial ports and other devices, without the control socket of the VMM.
fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io("cannot read the directory of a clone", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let is_control = |name: &OsStr| [QMP_SOCKET, API_SOCKET, VSOCK].iter().any(|its| name == *its);
        if entry.file_type().map_err(fail)?.is_socket() && !is_control(&entry.file_name()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
