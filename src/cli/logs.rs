//! `stencil logs`: what a clone has said.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::Global;
use super::output::{Done, Report};
use crate::clones::registry::{self, LOG, SERIAL_LOG};
use crate::error::{Error, Result};

/// Print what a clone has written, and what its guest has on the serial port
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Its id
    #[arg(value_name = "ID")]
    id: String,
}

struct LogsReport {
    id: String,
    log: String,
    serial: Option<String>,
    /// Sockets in its folder on which it talks, and does not write down.
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
                "{name} is a socket, not a log; to connect: socat -,rawer UNIX-CONNECT:{}",
                socket.display()
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        json!({"id": self.id, "log": self.log, "serial": self.serial, "sockets": self.sockets})
    }
}

/// Runs it.
///
/// # Errors
/// When there is no such clone, or its log cannot be read.
pub fn run(args: &LogsArgs, _global: &Global) -> Result<Done> {
    let entry = registry::find(&args.id)?;
    let text = |name: &str| {
        let path = entry.dir.join(name);
        let failed = |e| {
            let remedy = format!("look at it there: tail {}", path.display());
            Error::io("cannot read the log of a clone", &path, e).remedy(remedy)
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok::<_, Error>(entry.read_file(name).map_err(failed)?.map(text))
    };
    let (log, serial) = (text(LOG)?.unwrap_or_default(), text(SERIAL_LOG)?);
    Ok(Done::report(LogsReport { log, serial, sockets: sockets(&entry.dir)?, id: entry.id }))
}

/// Sockets of serial ports and other character devices; the monitor's has a protocol of its own.
fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io("cannot read the folder of a clone", dir, e);
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
