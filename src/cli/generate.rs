//! `stencil generate`: man pages and shell completions, made from the commands themselves.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::{Value, json};

use super::mount_helper::Helper;
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
    /// Write one man page a command, and those of mount(8)'s helper and of the daemon, into a directory
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
            man_page(Helper::command(), dir)?;
            write_page(&dir.join("stencil-mountd.8"), DAEMON)?;
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

/// The daemon's page: it has one caller, and no options that people should type.
const DAEMON: &str = include_str!("stencil-mountd.8");

/// A page of section 8 for programs that only other programs call.
fn man_page(command: clap::Command, dir: &Path) -> Result<()> {
    let path = dir.join(format!("{}.8", command.get_name()));
    let mut page = Vec::new();
    clap_mangen::Man::new(command).section("8").render(&mut page).map_err(|e| cannot_write(&path, e))?;
    write_page(&path, page)
}

fn man_pages(command: &clap::Command, name: &str, dir: &Path) -> Result<()> {
    let path = dir.join(format!("{name}.1"));
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone().name(name.to_owned()));
    man.render(&mut page).map_err(|e| cannot_write(&path, e))?;
    write_page(&path, page)?;
    for below in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        man_pages(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(())
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::io("cannot write the man page", path, error)
}

fn write_page(path: &Path, page: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, page).map_err(|e| cannot_write(path, e))
}
