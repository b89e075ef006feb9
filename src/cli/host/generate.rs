//! `stencil generate`: writes man pages and shell completions from the definitions of the commands.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::{Value, json};

use crate::cli::mount::helper::Helper;
use crate::cli::{Done, Report};
use crate::error::{Error, Result};

/// Arguments of `stencil generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Write a man page for each command, for the helper of mount(8) and for the daemon into a directory
    Man {
        /// Existing directory
        dir: PathBuf,
    },
    /// Print the completion script for a shell
    Completions {
        /// Name of the shell
        shell: Shell,
    },
}

/// Runs `stencil generate` for this command line.
///
/// # Errors
/// Returns an error if the directory cannot be written.
pub fn run(args: &GenerateArgs, mut command: clap::Command) -> Result<Done> {
    match &args.what {
        What::Man { dir } => {
            // The pages would refer to stencil-help(1), which does not exist.
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
            // The generator panics if the reader of standard output closes the pipe, so it writes to memory.
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

/// The daemon has no options for users, so its page is written by hand.
const DAEMON: &str = include_str!("stencil-mountd.8");
/// Sections that cannot be generated from options.
const STENCIL_MORE: &str = include_str!("stencil-more.1");
const HELPER_MORE: &str = include_str!("mount.fuse.stencil-more.8");
const COMMAND_EXIT: &str = ".SH EXIT STATUS\nSee stencil(1).\n";
const COMMAND_SEE: &str = ".SH SEE ALSO\nstencil(1)\n";

fn man_pages(command: &clap::Command, name: &str, dir: &Path) -> Result<()> {
    let more = match name {
        "stencil" => STENCIL_MORE.to_owned(),
        _ => [COMMAND_EXIT, &examples(command), COMMAND_SEE].concat(),
    };
    let page = command.clone().name(name.to_owned()).after_help(None::<&str>);
    write_page(&page, "1", &more, dir)?;
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        man_pages(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(())
}

/// Returns the EXAMPLES section of a command. The generator would put the examples under EXTRA, without line breaks.
fn examples(command: &clap::Command) -> String {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let lines = help.lines().filter(|line| line.starts_with("  ")).map(str::trim_start);
    let lines: Vec<String> = lines.map(|line| line.replace('\\', "\\e").replace('-', "\\-")).collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!(".SH EXAMPLES\n.nf\n{}\n.fi\n", lines.join("\n")),
    }
}
fn write_page(command: &clap::Command, section: &str, more: &str, dir: &Path) -> Result<()> {
    let path = dir.join(format!("{}.{section}", command.get_name()));
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).section(section);
    man.render(&mut page).map_err(|e| cannot_write(&path, e))?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    let many = |arg: &&clap::Arg| arg.get_num_args().is_some_and(|count| count.max_values() > 1);
    for arg in command.get_positionals().filter(many) {
        // The generator omits the ellipsis of arguments that may be repeated.
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

#[cfg(test)]
mod tests {
    use crate::cli::Cli;
    use crate::cli::host::generate::*;

    #[test]
    fn man_pages_have_one_examples_section() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        man_pages(&command, "stencil", dir.path()).unwrap();
        for (page, example) in [
            ("stencil.1", "\nstencil stop \\-\\-all\n"),
            ("stencil-import.1", "\nstencil import guest.ram web:1\n"),
            ("stencil-recipe-edit.1", "\nstencil recipe edit web:1\n"),
        ] {
            let text = fs::read_to_string(dir.path().join(page)).unwrap();
            assert_eq!(text.matches(".SH EXAMPLES\n").count(), 1, "{text}");
            assert!(text.contains(example) && !text.contains(".SH EXTRA"), "{text}");
        }
    }
}
