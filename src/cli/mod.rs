//! The command line: parse, run, print, exit. Each file holds one command, or a few related commands.
#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments of arguments are help texts: NAME[:TAG]")]

mod clones;
mod columns;
mod exporter;
mod global;
mod host;
mod interrupt;
mod mount;
mod output;
mod parse_error;
mod progress;
mod recording;
mod store;
mod store_filter;
mod top;
mod value_parsers;

use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Result;
pub use global::Global;
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

#[derive(Debug, Subcommand)]
enum Command {
    Import(store::import::ImportArgs),
    #[command(alias = "images", alias = "list")]
    Ls(store::ls::LsArgs),
    Inspect(store::inspect::InspectArgs),
    Tag(store::tag::TagArgs),
    #[command(alias = "rmi")]
    Rm(store::rm::RmArgs),
    Chmod(store::chmod::ChmodArgs),
    Chown(store::chmod::ChownArgs),
    Export(store::export::ExportArgs),
    Save(store::save::SaveArgs),
    Load(store::load::LoadArgs),
    Verify(store::maintain::verify::VerifyArgs),
    Gc(store::maintain::gc::GcArgs),
    Du(store::maintain::du::DuArgs),
    Store(store::maintain::whole_store::StoreArgs),
    Path(mount::path::PathArgs),
    Args(clones::args::VmmArgs),
    Recipe(store::recipe::RecipeArgs),
    Explain(clones::explain::ExplainArgs),
    /// Show the memory that each clone has copied and the memory of all clones
    Density(clones::density::DensityArgs),
    Check(clones::check::CheckArgs),
    /// Show the dirty pages of one clone: copied by a write or replaced by other memory
    Dirty(clones::dirty::DirtyArgs),
    /// Check what this host supports and what reduces sharing
    Doctor(host::doctor::DoctorArgs),
    Record(recording::record::RecordArgs),
    Report(recording::report::ReportArgs),
    Exporter(exporter::ExporterArgs),
    Top(top::TopArgs),
    /// Write man pages or shell completions
    #[command(hide = true)]
    Generate(host::generate::GenerateArgs),
    Mount(mount::attach::MountArgs),
    #[command(alias = "unmount")]
    Umount(mount::umount::UmountArgs),
    Restart(mount::restart::RestartArgs),
    Status(mount::status::StatusArgs),
    Capacity(clones::capacity::CapacityArgs),
    Capture(clones::capture::CaptureArgs),
    Clone(clones::clone::CloneArgs),
    Warm(clones::warm::WarmArgs),
    WorkingSet(clones::working_set::WorkingSetArgs),
    Ps(clones::ps::PsArgs),
    Logs(clones::logs::LogsArgs),
    #[command(alias = "kill")]
    Stop(clones::stop::StopArgs),
    /// Print the version
    #[command(hide = true)]
    Version,
}

fn run(cli: Cli) -> Result<Done> {
    let global = &cli.global;
    match &cli.command {
        Command::Import(args) => store::import::run(args, global),
        Command::Ls(args) => store::ls::run(args, global),
        Command::Inspect(args) => store::inspect::run(args, global),
        Command::Tag(args) => store::tag::run(args, global),
        Command::Rm(args) => store::rm::run(args, global),
        Command::Chmod(args) => store::chmod::run(args, global),
        Command::Chown(args) => store::chmod::run_chown(args, global),
        Command::Export(args) => store::export::run(args, global),
        Command::Save(args) => store::save::run(args, global),
        Command::Load(args) => store::load::run(args, global),
        Command::Verify(args) => store::maintain::verify::run(args, global),
        Command::Gc(args) => store::maintain::gc::run(args, global),
        Command::Du(args) => store::maintain::du::run(args, global),
        Command::Store(args) => store::maintain::whole_store::run(args),
        Command::Path(args) => mount::path::run(args, global),
        Command::Args(args) => clones::args::run(args, global),
        Command::Recipe(args) => store::recipe::run(args, global),
        Command::Explain(args) => clones::explain::run(args, global),
        Command::Density(args) => clones::density::run(args, global),
        Command::Check(args) => clones::check::run(args, global),
        Command::Dirty(args) => clones::dirty::run(args, global),
        Command::Doctor(args) => host::doctor::run(args, global),
        Command::Record(args) => recording::record::run(args, global),
        Command::Report(args) => recording::report::run(args, global),
        Command::Exporter(args) => exporter::run(args, global),
        Command::Top(args) => top::run(args, global),
        Command::Generate(args) => host::generate::run(args, Cli::command()),
        Command::Mount(args) => mount::attach::run(args, global),
        Command::Umount(args) => mount::umount::run(args, global),
        Command::Restart(args) => mount::restart::run(args, global),
        Command::Status(args) => mount::status::run(args, global),
        Command::Capacity(args) => clones::capacity::run(args, global),
        Command::Capture(args) => clones::capture::run(args, global),
        Command::Clone(args) => clones::clone::run(args, global),
        Command::Warm(args) => clones::warm::run(args, global),
        Command::WorkingSet(args) => clones::working_set::run(args, global),
        Command::Ps(args) => clones::ps::run(args, global),
        Command::Logs(args) => clones::logs::run(args, global),
        Command::Stop(args) => clones::stop::run(args, global),
        Command::Version => Ok(host::version::run()),
    }
}

/// Runs the command that the arguments of this process select.
pub fn main() -> ExitCode {
    if let Some(code) = crate::clones::launch::helper_main() {
        return code;
    }
    if mount::helper::is_called(std::env::args_os().next().as_deref()) {
        return mount::helper::main();
    }
    let parsed =
        Cli::command().try_get_matches().and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (mut cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            let mut cli = Cli::command();
            return parse_error::report(&error.format(&mut cli), &mut cli);
        }
    };
    cli.global.names_store = matches.value_source("store") != Some(ValueSource::DefaultValue);
    let daemon = match &cli.command {
        Command::Exporter(args) if args.serves() => Some(args.log_format),
        _ => None,
    };
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => "error",
        (_, 0) if daemon.is_none() => "warn",
        (_, 0 | 1) => "info",
        _ => "debug",
    };
    output::start_log(level, daemon);
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
