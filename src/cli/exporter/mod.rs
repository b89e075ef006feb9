//! `stencil exporter`: serves figures of mounts and clones to Prometheus.
//!
//! Figures are collected in another process, on demand and at most once in `--max-age`. A scrape waits for a collection
//! for at most [`SCRAPE_WAIT`], then answers with the last figures and their age.

mod collector;
mod figures;
mod http;
mod listener;
mod metrics;
mod samples;

use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::collector::Collector;
use self::figures::{ClonesFigures, Collected, MountsFigures, Subject};
use self::http::{Page, Response};
use self::listener::{Address, Listener};
use self::samples::Scrape;
use crate::cli::output::Done;
use crate::cli::{Global, value_parsers};
use crate::error::{Error, Result};
use crate::json_log::LogFormat;
use crate::sys::memory::alloc;
use crate::sys::process;

/// Longest wait of a scrape for a collection. A scrape is answered within a second.
const SCRAPE_WAIT: Duration = Duration::from_millis(500);

/// Longest collection about clones. A collection that takes longer is ended.
const CLONES_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest collection about mounts.
const MOUNTS_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of connections that are served at the same time. Further ones wait in the backlog of the socket.
const CONNECTIONS: usize = 32;

/// Largest value of `--per-clone`.
const MAX_CLONES: i64 = 10_000;

/// Serve the figures of mounts, templates and clones to Prometheus
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil exporter
  stencil exporter --listen unix:/run/stencil-exporter.sock --log-format json
  stencil exporter --listen 10.0.0.5:9470 --max-age 30 --per-clone 100")]
pub struct ExporterArgs {
    /// Address and port, or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9470", value_parser = value_parsers::word::<Address>)]
    listen: Address,
    /// Seconds for which figures are served again before they are collected again
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = value_parsers::seconds)]
    max_age: Duration,
    /// Add figures of single clones: of the N with the most copied memory
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true,
        value_parser = clap::value_parser!(u32).range(0..=MAX_CLONES))]
    per_clone: u32,
    /// Log format: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = value_parsers::word::<LogFormat>)]
    pub log_format: LogFormat,
    /// Collect figures once and print them; the exporter starts such a process for each collection.
    #[arg(long, hide = true)]
    collect: Option<Subject>,
}

impl ExporterArgs {
    /// Returns true unless the command collects for an exporter.
    pub fn serves(&self) -> bool {
        self.collect.is_none()
    }
}

struct Exporter {
    clones: Collector<ClonesFigures>,
    mounts: Collector<MountsFigures>,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// Returns an error if the address cannot be used, or if signals cannot be handled.
pub fn run(args: &ExporterArgs, global: &Global) -> Result<Done> {
    if let Some(subject) = args.collect {
        return Ok(Done::report(Collected(figures::collect(subject, args.per_clone, global))));
    }
    alloc::use_one_heap();
    // Before the socket exists: a signal must not leave it behind.
    let mut signals =
        Signals::new([SIGTERM, SIGINT]).map_err(|e| Error::failed("cannot handle signals").because(e))?;
    let exporter = Arc::new(Exporter {
        clones: Collector::start(args.max_age, CLONES_TIMEOUT, collection(Subject::Clones, args, global))?,
        mounts: Collector::start(args.max_age, MOUNTS_TIMEOUT, collection(Subject::Mounts, args, global))?,
    });
    let listener = Arc::new(Listener::bind(&args.listen)?);
    for _ in 0..CONNECTIONS {
        let (listener, exporter) = (Arc::clone(&listener), Arc::clone(&exporter));
        let serve = move || listener.serve(|request| exporter.answer(request));
        thread::Builder::new().spawn(serve).map_err(|e| {
            Error::failed("cannot start a thread").because(e).hint("raise the limit of tasks")
        })?;
    }
    log::info!("listening on {}", listener.name());
    let signal = signals.forever().next().unwrap_or_default();
    log::info!("stopping after signal {signal}");
    listener.remove();
    Ok(Done::silent())
}

/// Returns a function that makes the command for one collection.
fn collection(
    subject: Subject,
    args: &ExporterArgs,
    global: &Global,
) -> impl Fn() -> Command + Send + 'static + use<> {
    let store = global.names_store.then(|| global.store.clone());
    let per_clone = args.per_clone;
    move || {
        // The program of this process, even after an upgrade has replaced its file.
        let mut command = Command::new("/proc/self/exe");
        command.args(["exporter", "--quiet", "--collect", subject.name()]);
        command.args(["--per-clone", &per_clone.to_string()]);
        if let Some(store) = &store {
            command.arg("--store").arg(store);
        }
        // Warnings of a collection would repeat at each scrape; a failure is in the output.
        command.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        process::die_with_starter(&mut command);
        command
    }
}

impl Exporter {
    fn answer(&self, page: Page) -> Response {
        let format = match page {
            Page::Index => return Response::text("The metrics of Stencil are at /metrics.\n"),
            Page::Metrics(format) => format,
        };
        let until = Instant::now() + SCRAPE_WAIT;
        self.clones.request();
        self.mounts.request();
        let scrape = Scrape { clones: self.clones.wait(until), mounts: self.mounts.wait(until) };
        match samples::encode(&scrape, format) {
            Ok(body) => Response::metrics(format, body),
            Err(error) => Response::failed(&error.to_string()),
        }
    }
}
