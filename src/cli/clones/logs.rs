//! `stencil logs`: prints the output of a clone.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::output::{Done, Report};
use crate::clones::registry::{self, LOG, SERIAL_LOG};
use crate::error::{Error, Result};

/// Print the output of a clone and of its guest's serial port
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil logs c1a2b3c4
  stencil logs c1a2b3c4 --json")]
pub struct LogsArgs {
    /// Id of the clone
    #[arg(value_name = "ID")]
    id: String,
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
pub fn run(args: &LogsArgs, _global: &Global) -> Result<Done> {
    let entry = registry::find(&args.id)?;
    let text = |name: &str| {
        let path = entry.dir.join(name);
        let failed = |e| {
            let remedy = format!("read the end of the file: tail {}", path.display());
            Error::io("cannot read the log of a clone", &path, e).remedy(remedy)
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok::<_, Error>(entry.read_file(name).map_err(failed)?.map(text))
    };
    let (log, serial) = (text(LOG)?.unwrap_or_default(), text(SERIAL_LOG)?);
    Ok(Done::report(LogsReport { log, serial, sockets: sockets(&entry.dir)?, id: entry.id }))
}

/// Returns the sockets of serial ports and other character devices, without the QMP monitor.
fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io("cannot read the directory of a clone", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_type().map_err(fail)?.is_socket() && entry.file_name() != "qmp.sock" {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
