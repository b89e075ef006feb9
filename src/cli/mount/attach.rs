//! `stencil mount`: mounts the store as a file system.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::output::{Done, Report};
use crate::cli::{Global, value_parsers};
use crate::control::{self, MountOptions, OnDamage, ServeMode};
use crate::error::{Error, Result};
use crate::json_log::LogFormat;
use crate::sanitize::path_text;
use crate::sys::files::read_ahead;
use crate::units::Bytes;

/// Mount the store, with each template as read-only files
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil mount /srv/templates
  stencil mount /srv/templates --cache-dir /var/cache/stencil --cache-size 20G
  stencil mount -f -o serve=decode /srv/templates")]
pub struct MountArgs {
    /// Empty directory to mount the store on
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Stay in the foreground and log to standard error
    #[arg(short = 'f', long)]
    foreground: bool,
    /// Options in the form of mount(8): serve=, cache-dir=, cache-size=, hydrate-timeout=, watchdog=, on-damage=,
    /// scrub-interval=, read-ahead=, log-format=, noexec
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// Way to serve files: auto, kernel, passthrough or decode
    #[arg(long, value_name = "HOW", value_parser = value_parsers::word::<ServeMode>)]
    serve: Option<ServeMode>,
    /// Directory for backings, or for the metadata of kernel decode [default: the store's directory]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Maximum size of all passthrough backings [default: half of the free space, or a quarter of the RAM]
    #[arg(long, value_name = "SIZE", value_parser = value_parsers::size)]
    cache_size: Option<Bytes>,
    /// Seconds that the first open of a file waits for its backing [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = value_parsers::seconds)]
    hydrate_timeout: Option<Duration>,
    /// Seconds that a request may make no progress before the server is replaced; 0 for no limit [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = value_parsers::seconds)]
    watchdog: Option<Duration>,
    /// What happens to a process that needs a damaged block: eio (only an error), stop or kill [default: eio]
    #[arg(long, value_name = "HOW", value_parser = value_parsers::word::<OnDamage>)]
    on_damage: Option<OnDamage>,
    /// Seconds between two verifications of a file, with kernel decode; 0 for a single one [default: a week]
    #[arg(long, value_name = "SECONDS", value_parser = value_parsers::seconds)]
    scrub_interval: Option<Duration>,
    /// Bytes that the kernel reads ahead; 0 for none [default: 512K for files served by decode, 4M for kernel decode]
    #[arg(long, value_name = "SIZE", value_parser = value_parsers::read_ahead)]
    read_ahead: Option<Bytes>,
    /// Log format: text or json [default: text]
    #[arg(long, value_name = "FORMAT", value_parser = value_parsers::word::<LogFormat>)]
    log_format: Option<LogFormat>,
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
        options.on_damage = self.on_damage.unwrap_or(options.on_damage);
        options.scrub_interval = self.scrub_interval.unwrap_or(options.scrub_interval);
        options.read_ahead = self.read_ahead.or(options.read_ahead);
        options.log_format = self.log_format.unwrap_or(options.log_format);
        options.foreground = self.foreground;
        Ok(options)
    }
}

/// Mounts the store. Returns when the mount is being served; with `-f`, when the mount has ended.
///
/// # Errors
/// Returns an error with a remedy if the mountpoint, the store, the options or the host do not allow a mount.
pub fn run(args: &MountArgs, global: &Global) -> Result<Done> {
    let options = args.to_options(global)?;
    if options.foreground {
        return Err(control::exec_supervisor(&options));
    }
    control::start_supervisor(&options)?;
    let root = std::fs::metadata(&options.mountpoint).map_err(|e| {
        Error::io("the mount does not respond", &options.mountpoint, e)
            .hint("see 'stencil status' and the log in the runtime directory")
    })?;
    let size = options.read_ahead(ServeMode::Decode);
    if read_ahead::get(root.dev()).ok() != Some(size) {
        crate::print_line!("note: the read-ahead is not {size}: the log of the mount has the reason");
    }
    if options.serve == ServeMode::Kernel
        && let Some(why) = no_backings(&options.mountpoint)
    {
        crate::print_line!("note: files are served by decode: {why}");
    }
    Ok(Done::report(Mounted { mountpoint: options.mountpoint, store: options.store }))
}

/// Returns why a mount has no backings, if it has none.
fn no_backings(mountpoint: &Path) -> Option<String> {
    let mountpoint = std::fs::canonicalize(mountpoint).ok()?;
    let mount = control::mounts().ok()?.into_iter().find(|mount| mount.mountpoint == mountpoint)?;
    let status = mount.status().ok()?;
    status.cache_why.filter(|_| status.cache.is_none())
}
