//! Options of every command.

use std::path::PathBuf;

use clap::Args;

use super::progress::{self, Form};
use crate::progress::{Progress, Silent};

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Directory of the template store
    #[arg(
        long,
        global = true,
        env = "STENCIL_STORE",
        default_value = "/var/lib/stencil",
        value_name = "DIR"
    )]
    pub store: PathBuf,
    /// True if `--store` or `STENCIL_STORE` is set.
    #[arg(skip)]
    pub names_store: bool,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Report progress on standard error: auto (a bar, on a terminal) or json (one JSON object per line)
    #[arg(long, global = true, value_name = "FORM", default_value = "auto", hide_possible_values = true)]
    pub progress: Form,
    /// Print only results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log informational messages; repeat for debug messages
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Global {
    /// Returns true if a bar is drawn: standard error is a terminal, and neither `--quiet` nor `--json` is given.
    fn draws(&self) -> bool {
        !self.quiet && !self.json && std::io::IsTerminal::is_terminal(&std::io::stderr())
    }

    /// Returns true if progress is reported.
    pub fn shows_progress(&self) -> bool {
        self.progress == Form::Json || self.draws()
    }

    /// Returns the receiver of progress for standard error, in the form that the options select.
    pub fn progress(&self) -> Box<dyn Progress> {
        match self.progress {
            Form::Json => progress::json_lines(),
            Form::Auto if self.draws() => progress::bar(),
            Form::Auto => Box::new(Silent),
        }
    }
}
