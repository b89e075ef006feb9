//! `stencil-mountd`: supervisor and server of one Stencil mount.
//!
//! ```text
//!   stencil mount ──starts──▶ supervisor: holds the mount, the counters, the backings, the control socket
//!                                │ starts a server, and a successor when the server dies
//!                                ▼
//!                             server: speaks FUSE; has no state that a successor could not reconstruct
//! ```

#![cfg_attr(
    test,
    allow(
        clippy::cast_lossless,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
    )
)]
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod protocol;
mod server;
mod startup;
mod supervisor;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use stencilfs::control::{CONTROL_VERSION, MountOptions};
use stencilfs::json_log::{self, LogFormat};

/// Allocates zeroed memory whose pages are already present, for the buffers that receive requests of the kernel.
#[global_allocator]
static ALLOCATOR: stencilfs::sys::memory::alloc::PrefaultedZeros =
    stencilfs::sys::memory::alloc::PrefaultedZeros;

const USAGE: &str = "\
stencil-mountd serves a Stencil store through FUSE. 'stencil mount' starts it.

usage: stencil-mountd supervise --store=DIR [--serve=auto|passthrough|decode] [--cache-dir=DIR]
                      [--cache-size=BYTES] [--hydrate-timeout=SECONDS] [--watchdog=SECONDS]
                      [--on-damage=eio|stop|kill] [--read-ahead=BYTES] [--log-format=text|json] [--noexec]
                      -- MOUNTPOINT
       stencil-mountd --version";

/// Prints a line to standard output; a closed pipe is ignored.
fn print_line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Returns the mountpoint: the last argument of a server, and of a supervisor that continues.
fn mountpoint() -> Option<PathBuf> {
    std::env::args_os().next_back().map(PathBuf::from)
}

/// Starts logging to standard error.
fn start_log(process: &'static str, format: LogFormat, mount: Option<&Path>) {
    let level = env_logger::Env::new().filter_or("STENCIL_LOG", "info");
    let mut log = env_logger::Builder::from_env(level);
    log.format_timestamp_millis().filter_module("fuser", log::LevelFilter::Warn);
    if format == LogFormat::Json {
        json_log::start(process);
        mount.into_iter().for_each(json_log::set_mount);
        log.format(json_log::write);
    }
    log.init();
}

fn main() -> ExitCode {
    let command = std::env::args_os().nth(1).unwrap_or_default();
    // After exec(2) in a running supervisor, signals stay blocked until their handlers are installed.
    stencilfs::sys::process::inherited::reset(command == "resume");
    // By default a program that is executed from /proc/self/fd/N is named N.
    let _ = rustix::thread::set_name(c"stencil-mountd");
    let args = std::env::args_os().skip(2);
    match command.to_str() {
        Some("supervise") => match MountOptions::from_args(args) {
            Ok(options) => {
                start_log("supervisor", options.log_format, Some(&options.mountpoint));
                startup::supervise(options)
            }
            Err(error) => {
                stencilfs::print_line!("stencil-mountd: {error}\n{USAGE}");
                ExitCode::from(error.code().exit_code())
            }
        },
        Some("resume") => {
            start_log("supervisor", LogFormat::from_environment(), mountpoint().as_deref());
            startup::resume(args)
        }
        Some("check") => startup::check(),
        Some("unrecorded") => startup::orphan_probe::main(args),
        Some("serve") => {
            start_log("server", LogFormat::from_environment(), mountpoint().as_deref());
            server::main(args)
        }
        Some("--version") => {
            print_line(&format!("stencil-mountd {} (control {CONTROL_VERSION})", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        Some("--help" | "-h") => {
            print_line(USAGE);
            ExitCode::SUCCESS
        }
        _ => {
            stencilfs::print_line!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
