//! `stencil generate`: man pages and shell completions, made from the commands themselves.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::{Value, json};

use super::{Cli, Done, Global, Report};
use crate::error::{Error, Result};

/// Arguments of `stencil generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Write one man page a command into a directory
    Man {
        /// The directory; it must exist
        dir: PathBuf,
    },
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

/// Generates.
///
/// # Errors
/// When the directory cannot be written.
pub fn run(args: &GenerateArgs, _global: &Global) -> Result<Done> {
    let mut command = Cli::command();
    command.build();
    match &args.what {
        What::Man { dir } => {
            man_pages(&command, "stencil", dir)?;
            Ok(Done::silent())
        }
        What::Completions { shell } => {
            // Not straight to standard output: the generator panics when a reader goes away early.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut command, "stencil", &mut script);
            Ok(Done::report(Script(script)))
        }
    }
}

struct Script(Vec<u8>);

impl Report for Script {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.0)
    }

    fn json(&self) -> Value {
        json!({ "script": String::from_utf8_lossy(&self.0) })
    }
}

fn man_pages(command: &clap::Command, name: &str, dir: &Path) -> Result<()> {
    let mut page = Vec::new();
    let path = dir.join(format!("{name}.1"));
    let failed = |e| Error::io("cannot write the man page", &path, e);
    clap_mangen::Man::new(command.clone().name(name.to_owned())).render(&mut page).map_err(failed)?;
    fs::write(&path, page).map_err(failed)?;
    for below in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        man_pages(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(())
}
