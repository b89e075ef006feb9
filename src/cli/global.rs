//! Options of every command.

use std::path::PathBuf;

use clap::Args;

use super::progress;

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
    /// Print only results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log more; repeat for debug messages
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Global {
    /// Returns true if progress is drawn: standard error is a terminal, and neither `--quiet` nor `--json` is given.
    pub fn draws(&self) -> bool {
        !self.quiet && !self.json && std::io::IsTerminal::is_terminal(&std::io::stderr())
    }

    /// Returns a progress bar on standard error if progress is drawn, otherwise a sink that draws nothing.
    pub fn progress(&self) -> Box<dyn crate::progress::Progress> {
        if self.draws() { progress::bar() } else { Box::new(crate::progress::Silent) }
    }
}
