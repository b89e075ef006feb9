//! `stencil mount`: serve the store's templates as files.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::output::{Done, Report};
use super::{Global, words};
use crate::control::{self, MountOptions, ServeMode};
use crate::error::{Error, Result};
use crate::shown::path_text;
use crate::units::Bytes;

/// Mount the store: every template as read-only files
#[derive(Debug, Args)]
pub struct MountArgs {
    /// An empty directory
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Stay in the foreground and log to the terminal
    #[arg(short = 'f', long)]
    foreground: bool,
    /// Options as mount(8) writes them: serve=, cache-dir=, cache-size=, hydrate-timeout=, watchdog=, noexec
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// How files are served: auto, passthrough or decode
    #[arg(long, value_name = "HOW", value_parser = words::word::<ServeMode>)]
    serve: Option<ServeMode>,
    /// Directory for passthrough backings [default: the store's own filesystem]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Most bytes of passthrough backings [default: half of what is free there]
    #[arg(long, value_name = "SIZE", value_parser = words::size)]
    cache_size: Option<Bytes>,
    /// Seconds that the first open of a file waits for its backing [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = words::seconds)]
    hydrate_timeout: Option<Duration>,
    /// Seconds that a request of the kernel may stay unanswered before the server is replaced; 0 for ever [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = words::seconds)]
    watchdog: Option<Duration>,
}

struct Mounted {
    mountpoint: PathBuf,
    store: PathBuf,
}

impl Report for Mounted {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} is mounted on {}", self.store.display(), self.mountpoint.display())
    }

    fn json(&self) -> Value {
        json!({"mountpoint": path_text(&self.mountpoint), "store": path_text(&self.store)})
    }
}

impl MountArgs {
    fn to_options(&self, global: &Global) -> Result<MountOptions> {
        let mut options = MountOptions::new(&self.mountpoint, &global.store);
        for list in &self.options {
            options.apply(list)?;
        }
        options.serve = self.serve.unwrap_or(options.serve);
        options.cache_dir = self.cache_dir.clone().or(options.cache_dir);
        options.cache_size = self.cache_size.or(options.cache_size);
        options.hydrate_timeout = self.hydrate_timeout.unwrap_or(options.hydrate_timeout);
        options.watchdog = self.watchdog.unwrap_or(options.watchdog);
        options.foreground = self.foreground;
        Ok(options)
    }
}

/// Mounts, and comes back when the mount answers; with `-f` when it has ended.
///
/// # Errors
/// What is in the way, with its remedy.
pub fn run(args: &MountArgs, global: &Global) -> Result<Done> {
    let options = args.to_options(global)?;
    if options.foreground {
        return Err(control::become_supervisor(&options));
    }
    control::start_supervisor(&options)?;
    std::fs::metadata(&options.mountpoint).map_err(|e| {
        Error::io("the mount does not answer", &options.mountpoint, e)
            .remedy("see `stencil status` and the log in the runtime directory")
    })?;
    Ok(Done::report(Mounted { mountpoint: options.mountpoint, store: options.store }))
}
