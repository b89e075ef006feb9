//! The command line: parse, run, print, exit. Each file holds one command, or a few related commands.
#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments of arguments are help texts: NAME[:TAG]")]

mod args;
mod capture;
mod chmod;
mod clone;
mod columns;
mod density;
mod dirty;
mod doctor;
mod du;
mod explain;
mod export;
mod gc;
mod generate;
mod hydrate;
mod import;
mod inspect;
mod interrupt;
mod load;
mod logs;
mod ls;
mod mount;
mod mount_helper;
mod output;
mod path;
mod progress;
mod ps;
mod recipe;
mod restart;
mod rm;
mod save;
mod status;
mod stop;
mod store_filter;
mod stuck;
mod tag;
mod umount;
mod users;
mod verify;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Result;
pub use output::{Done, Report};

/// Manage template memory for microVMs and sandboxes
#[derive(Debug, Parser)]
#[command(name = "stencil", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  stencil import guest.ram web:1 --state guest.state
  stencil mount /srv/templates
  stencil clone web:1 -n 100 -- your-vmm --mem {memory} --state {state}";

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

#[derive(Debug, Subcommand)]
enum Command {
    Import(import::ImportArgs),
    Ls(ls::LsArgs),
    Inspect(inspect::InspectArgs),
    Tag(tag::TagArgs),
    Rm(rm::RmArgs),
    Chmod(chmod::ChmodArgs),
    Chown(chmod::ChownArgs),
    Export(export::ExportArgs),
    Save(save::SaveArgs),
    Load(load::LoadArgs),
    Verify(verify::VerifyArgs),
    Gc(gc::GcArgs),
    Du(du::DuArgs),
    Path(path::PathArgs),
    Args(args::VmmArgs),
    Recipe(recipe::RecipeArgs),
    Explain(explain::ExplainArgs),
    /// Show the memory that each clone has copied and the memory of all clones
    Density(density::DensityArgs),
    /// Show the pages that one clone has copied
    Dirty(dirty::DirtyArgs),
    /// Check what this host supports and what reduces sharing
    Doctor(doctor::DoctorArgs),
    /// Write man pages or shell completions
    #[command(hide = true)]
    Generate(generate::GenerateArgs),
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Restart(restart::RestartArgs),
    Status(status::StatusArgs),
    Capture(capture::CaptureArgs),
    Clone(clone::CloneArgs),
    Ps(ps::PsArgs),
    Logs(logs::LogsArgs),
    Stop(stop::StopArgs),
}

fn run(cli: Cli) -> Result<Done> {
    let global = &cli.global;
    match &cli.command {
        Command::Import(args) => import::run(args, global),
        Command::Ls(args) => ls::run(args, global),
        Command::Inspect(args) => inspect::run(args, global),
        Command::Tag(args) => tag::run(args, global),
        Command::Rm(args) => rm::run(args, global),
        Command::Chmod(args) => chmod::run(args, global),
        Command::Chown(args) => chmod::run_chown(args, global),
        Command::Export(args) => export::run(args, global),
        Command::Save(args) => save::run(args, global),
        Command::Load(args) => load::run(args, global),
        Command::Verify(args) => verify::run(args, global),
        Command::Gc(args) => gc::run(args, global),
        Command::Du(args) => du::run(args, global),
        Command::Path(args) => path::run(args, global),
        Command::Args(args) => args::run(args, global),
        Command::Recipe(args) => recipe::run(args, global),
        Command::Explain(args) => explain::run(args, global),
        Command::Density(args) => density::run(args, global),
        Command::Dirty(args) => dirty::run(args, global),
        Command::Doctor(args) => doctor::run(args, global),
        Command::Generate(args) => generate::run(args, global),
        Command::Mount(args) => mount::run(args, global),
        Command::Umount(args) => umount::run(args, global),
        Command::Restart(args) => restart::run(args, global),
        Command::Status(args) => status::run(args, global),
        Command::Capture(args) => capture::run(args, global),
        Command::Clone(args) => clone::run(args, global),
        Command::Ps(args) => ps::run(args, global),
        Command::Logs(args) => logs::run(args, global),
        Command::Stop(args) => stop::run(args, global),
    }
}

/// Runs the command that the arguments of this process select.
pub fn main() -> ExitCode {
    if let Some(code) = crate::clones::launch::helper_main() {
        return code;
    }
    if mount_helper::is_called(std::env::args_os().next().as_deref()) {
        return mount_helper::main();
    }
    let parsed =
        Cli::command().try_get_matches().and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (mut cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return output::clap_error(&error.format(&mut Cli::command())),
    };
    cli.global.names_store = matches.value_source("store") != Some(ValueSource::DefaultValue);
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    output::start_log(level);
    let json = cli.global.json;
    output::finish(run(cli), json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add_visible(command: &clap::Command, all: &mut Vec<clap::Command>) {
        for below in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
            all.push(below.clone());
            add_visible(below, all);
        }
    }

    #[test]
    fn every_command_has_examples_that_parse() {
        let mut all = Vec::new();
        add_visible(&Cli::command(), &mut all);
        assert!(all.len() > 25);
        for command in all {
            let name = command.get_name();
            let about = command.get_about().unwrap().to_string();
            assert!(about.starts_with(char::is_uppercase) && !about.ends_with('.'), "{name}: {about}");
            assert!(about.len() <= 100, "{name}: {about}");
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples: Vec<&str> = help.lines().skip_while(|line| *line != "Examples:").skip(1).collect();
            assert!((2..=3).contains(&examples.len()), "{name}: {help}");
            for example in examples {
                let call = &example[example.find("stencil ").unwrap()..];
                let call = call.split(['|', '>']).next().unwrap();
                // A shell expands such words before the parser gets them.
                if !call.contains('$') {
                    let parsed = Cli::command().try_get_matches_from(call.split_whitespace());
                    parsed.unwrap_or_else(|error| panic!("{example}: {error}"));
                }
            }
        }
    }
}
