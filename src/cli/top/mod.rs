//! `stencil top`: shows templates and clones, and what the clones copy each second.
//!
//! A separate thread measures (`sampling.rs`), so the screen and the keyboard never wait.

mod app;
mod figures;
mod keys;
mod rows;
mod sampling;
mod screen;
mod strip;
mod terminal;
mod text;

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc;
use std::time::Duration;

use clap::Args;

use self::app::App;
use self::figures::{Figures, Rates};
use self::rows::SortKey;
use self::sampling::{Event, Sampling};
use self::text::Frame;
use crate::cli::output::{Done, Report, with_schema};
use crate::cli::store_filter::StoreFilter;
use crate::cli::{Global, value_parsers};
use crate::control;
use crate::error::{Error, Result};

/// Number of threads that `--once` replaces before it gives up.
const MAX_REPLACED: u32 = 2;

/// Watch templates and clones, and the pages that clones copy
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil top
  stencil top --once
  stencil top --interval 10 --json")]
pub struct TopArgs {
    /// Seconds between two samples. A sample that takes much CPU time delays the next one
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = value_parsers::seconds)]
    interval: Duration,
    /// Sort the clones by this figure
    #[arg(long, value_name = "FIGURE", value_enum, default_value = "copied")]
    sort: SortKey,
    /// Print one sample and exit. Needs no terminal, and has no rates
    #[arg(long)]
    once: bool,
}

/// Runs until the user or a signal ends the command.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) without a terminal, an error if the first sample fails, and with
/// `--once` [`Code::TryAgain`](crate::error::Code::TryAgain) if the measurement does not return.
pub fn run(args: &TopArgs, global: &Global) -> Result<Done> {
    let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if !args.once && !global.json && !is_terminal {
        return Err(Error::usage("standard input or output is not a terminal")
            .hint("add --once for one sample as text, or --json for one JSON object per sample"));
    }
    let filter = StoreFilter::of(global)?;
    let mounts = move || {
        let mut mounts = control::mounts_and_dead()?;
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
        Ok(mounts)
    };
    let (sender, events) = mpsc::channel();
    let mut sampling = Sampling::start(mounts, args.interval, sender.clone())?;
    if args.once {
        let frame = Frame::new(next(&mut sampling, &events, &mut Rates::default(), MAX_REPLACED)?, args.sort);
        frame.check()?;
        return Ok(Done::report(frame));
    }
    if global.json {
        return lines(&mut sampling, &events, args.sort);
    }
    terminal::run(App::new(args.sort), &mut sampling, sender, &events)?;
    Ok(Done::silent())
}

/// Waits for the next sample, until more threads than this number had to be replaced.
fn next(
    sampling: &mut Sampling,
    events: &mpsc::Receiver<Event>,
    rates: &mut Rates,
    max_replaced: u32,
) -> Result<Figures> {
    loop {
        let wait = sampling.poll(Default::default)?;
        if sampling.replaced() > max_replaced {
            return Err(Error::try_again("the measurement does not return").hint(text::FIND_SERVER));
        }
        if let Ok(Event::Sampled(number, sample)) = events.recv_timeout(wait)
            && let Some(sample) = sampling.accept(number, *sample)
        {
            return sample.map(|sample| rates.add(sample));
        }
    }
}

/// Prints samples until the reader closes the pipe. A failure after the first sample is logged: the next sample may
/// succeed.
fn lines(sampling: &mut Sampling, events: &mpsc::Receiver<Event>, sort: SortKey) -> Result<Done> {
    let (mut rates, mut is_first) = (Rates::default(), true);
    loop {
        match next(sampling, events, &mut rates, u32::MAX) {
            Ok(figures) => {
                let line = with_schema(Frame::new(figures, sort).json());
                let mut out = io::stdout().lock();
                match writeln!(out, "{line}").and_then(|()| out.flush()) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Done::silent()),
                    Err(error) => return Err(Error::failed("cannot write a sample").because(error)),
                }
            }
            Err(error) if is_first => return Err(error),
            Err(error) => log::warn!("{error}"),
        }
        is_first = false;
    }
}
