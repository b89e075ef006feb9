//! Measures Stencil beside the floors and peers of each operation, writes the samples to a file, checks them against the
//! goals, and writes tables and drawings from them.

mod chart;
mod goals;
mod model;
mod report;
mod rows;
mod run;
mod statistics;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use stencilfs::error::{Error, Result};

use crate::goals::Goals;
use crate::model::Bench;
use crate::run::{PlaceArgs, RunArgs, interrupt};

/// Measure Stencil beside the floors and peers of each operation
#[derive(Debug, Parser)]
#[command(name = "stencil-bench")]
struct Arguments {
    /// File with the goals
    #[arg(long, global = true, default_value = "tests/bench/goals.json")]
    goals: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure all rows and write the samples to a file
    Run(RunArgs),
    /// Measure a small input until each row is within twice its goals; at most three tries a row
    Quick(PlaceArgs),
    /// Check samples against the goals, and the documentation against the samples
    Check {
        /// File with the samples
        file: PathBuf,
        /// Directory of the documentation
        #[arg(long)]
        docs: Option<PathBuf>,
    },
    /// Write tables and drawings of samples into the documentation
    Report {
        /// File with the samples
        file: PathBuf,
        /// Directory of the documentation
        #[arg(long)]
        docs: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(remedy) = error.hint_text() {
                eprintln!("hint: {remedy}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let goals = Goals::read(&arguments.goals)?;
    match &arguments.command {
        Command::Run(args) => {
            interrupt::watch()?;
            run::measure_all(args)
        }
        Command::Quick(args) => {
            interrupt::watch()?;
            run::measure_quickly(args, &goals)
        }
        Command::Check { file, docs } => check(file, docs.as_deref(), &goals),
        Command::Report { file, docs } => report::write(&Bench::read(file)?, &goals, docs),
    }
}

fn check(file: &Path, docs: Option<&Path>, goals: &Goals) -> Result<()> {
    let bench = Bench::read(file)?;
    let mut problems = goals.problems_of_samples(&bench);
    problems.extend(goals.missing_rows(&bench));
    problems.extend(goals.problems(&bench));
    if let Some(docs) = docs {
        problems.extend(report::problems(&bench, goals, docs)?);
    }
    if problems.is_empty() {
        println!("{}: {} rows, {} goals", file.display(), bench.rows.len(), goals.goals.len());
        return Ok(());
    }
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    Err(Error::failed(format!(
        "{} does not pass the check, number of problems: {}",
        file.display(),
        problems.len()
    )))
}
