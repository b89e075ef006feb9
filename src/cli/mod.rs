//! The command line: parse → run → print → exit. One file a command (or a small family of them).
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

/// Template memory for microVMs and sandboxes.
#[derive(Debug, Parser)]
#[command(name = "stencil", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

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
    /// True where the call or the environment names a store.
    #[arg(skip)]
    pub names_store: bool,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing but results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more; twice: everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Global {
    /// True where progress is drawn: on a terminal, unless the call asked for silence or JSON.
    pub fn draws(&self) -> bool {
        !self.quiet && !self.json && std::io::IsTerminal::is_terminal(&std::io::stderr())
    }

    /// A bar on standard error where progress is drawn, else nothing.
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
    /// Show what each clone has copied and what all of them really cost
    Density(density::DensityArgs),
    /// Show the pages that one clone has copied
    Dirty(dirty::DirtyArgs),
    /// Look at what this host can do and what costs sharing
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

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    if let Some(code) = crate::clones::launch::helper_main() {
        return code;
    }
    if mount_helper::is_called(std::env::args_os().next().as_deref()) {
        return mount_helper::main();
    }
    let parsed =
        Cli::command().try_get_matches().and_then(|words| Ok((Cli::from_arg_matches(&words)?, words)));
    let (mut cli, words) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return output::clap_error(&error.format(&mut Cli::command())),
    };
    cli.global.names_store = words.value_source("store") != Some(ValueSource::DefaultValue);
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
