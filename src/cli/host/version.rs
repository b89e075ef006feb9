//! `stencil version`: prints the version, as `--version` does.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::cli::output::{Done, Report};

struct Version(&'static str);

impl Report for Version {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "stencil {}", self.0)
    }

    fn json(&self) -> Value {
        json!({"version": self.0})
    }
}

/// Runs `stencil version`.
pub fn run() -> Done {
    Done::report(Version(env!("CARGO_PKG_VERSION")))
}
