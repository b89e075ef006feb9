//! `stencil logs`: what a clone has said.

use std::io::{self, Write};

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
    Ok(Done::report(LogsReport { log, serial, id: entry.id }))
}
