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
    match &args.what {
        What::Man { dir } => {
            // `help` has no page to point at.
            command = command.disable_help_subcommand(true);
            command.build();
            man_pages(&command, "stencil", dir)?;
            let mut helper = Helper::command().after_long_help(None::<&str>);
            helper.build();
            write_page(&helper, "8", HELPER_MORE, dir)?;
            write(&dir.join("stencil-mountd.8"), DAEMON)?;
            Ok(Done::silent())
        }
        What::Completions { shell } => {
            command.build();
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
/// What options do not say.
const STENCIL_MORE: &str = include_str!("stencil-more.1");
const HELPER_MORE: &str = include_str!("mount.fuse.stencil-more.8");
const COMMAND_MORE: &str = ".SH EXIT STATUS\nThat of stencil(1).\n.SH SEE ALSO\nstencil(1)\n";

fn man_pages(command: &clap::Command, name: &str, dir: &Path) -> Result<()> {
    let more = if name == "stencil" { STENCIL_MORE } else { COMMAND_MORE };
    write_page(&command.clone().name(name.to_owned()), "1", more, dir)?;
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        man_pages(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(())
}

fn write_page(command: &clap::Command, section: &str, more: &str, dir: &Path) -> Result<()> {
    let path = dir.join(format!("{}.{section}", command.get_name()));
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).section(section);
    man.render(&mut page).map_err(|e| cannot_write(&path, e))?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    let many = |arg: &&clap::Arg| arg.get_num_args().is_some_and(|count| count.max_values() > 1);
    for arg in command.get_positionals().filter(many) {
        // The generator shows one.
        for name in arg.get_value_names().unwrap_or_default() {
            for (before, after) in [("<", ">"), ("[", "]")] {
                let shown = format!("{before}\\fI{}\\fR{after}", name.replace('-', "\\-"));
                page = page.replace(&shown, &format!("{shown}..."));
            }
        }
    }
    write(&path, page + more)
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::io("cannot write the man page", path, error)
}

fn write(path: &Path, page: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, page).map_err(|e| cannot_write(path, e))
}
