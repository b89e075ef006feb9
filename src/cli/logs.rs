//! `stencil logs`: what a clone has said.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use clap::Args;
use serde_json::{Value, json};

use super::Global;
use super::output::{Done, Report};
use crate::clones::registry;
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
}

impl Report for LogsReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.log.as_bytes())?;
        out.write_all(self.serial.as_deref().unwrap_or_default().as_bytes())
    }

    fn json(&self) -> Value {
        json!({"id": self.id, "log": self.log, "serial": self.serial})
    }
}

/// Runs it.
///
/// # Errors
/// When there is no such clone, or its log cannot be read.
pub fn run(args: &LogsArgs, _global: &Global) -> Result<Done> {
    let entry = registry::find(&args.id)?;
    Ok(Done::report(LogsReport {
        log: text(&entry.log_path())?.unwrap_or_default(),
        serial: text(&entry.serial_path())?,
        id: entry.id,
    }))
}

fn text(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("cannot read the log of a clone", path, e)),
    }
}
