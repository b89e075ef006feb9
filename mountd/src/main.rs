//! `stencil-mountd`: supervisor and server of one Stencil mount.
//!
//! ```text
//!   stencil mount ──starts──▶ supervisor: holds the mount, the counters, the backings, the control socket
//!                                │ starts, and starts again when it dies
//!                                ▼
//!                             server: speaks FUSE; knows nothing that a successor could not find again
//! ```

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod protocol;
mod server;
mod startup;
mod supervisor;

use std::io::Write;
use std::process::ExitCode;

use stencilfs::control::{CONTROL_VERSION, MountOptions};

/// Prints a line; whoever reads standard output may have gone.
fn answer(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Requests of the kernel arrive in buffers that are there.
#[global_allocator]
static ALLOCATOR: stencilfs::sys::alloc::PresentZeros = stencilfs::sys::alloc::PresentZeros;

const USAGE: &str = "\
stencil-mountd serves a Stencil store through FUSE. It is started by `stencil mount`.

usage: stencil-mountd supervise --store=DIR [--serve=auto|passthrough|decode] [--cache-dir=DIR]
                      [--cache-size=BYTES] [--hydrate-timeout=SECONDS] [--watchdog=SECONDS] [--noexec]
                      -- MOUNTPOINT
       stencil-mountd --version";

fn main() -> ExitCode {
    let command = std::env::args_os().nth(1).unwrap_or_default();
    // A supervisor that became this program holds signals back until it can hear them.
    stencilfs::sys::inherited::reset(command == "resume");
    // Started from a descriptor, it would have the descriptor's number as its name.
    let _ = rustix::thread::set_name(c"stencil-mountd");
    let args = std::env::args_os().skip(2);
    let level = env_logger::Env::new().filter_or("STENCIL_LOG", "info");
    let mut log = env_logger::Builder::from_env(level);
    log.format_timestamp_millis().filter_module("fuser", log::LevelFilter::Warn);
    match command.to_str() {
        Some("supervise") => {
            log.init();
            match MountOptions::from_args(args) {
                Ok(options) => startup::supervise(options),
                Err(error) => {
                    stencilfs::say!("stencil-mountd: {error}\n{USAGE}");
                    ExitCode::from(error.code().exit_code())
                }
            }
        }
        Some("resume") => {
            log.init();
            startup::resume(args)
        }
        Some("check") => startup::check(),
        Some("unrecorded") => startup::orphan_probe::main(args),
        Some("serve") => {
            log.init();
            server::main(args)
        }
        Some("attempt") => {
            log.init();
            server::sandbox::attempt::main(args)
        }
        Some("--version") => {
            answer(&format!("stencil-mountd {} (control {CONTROL_VERSION})", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        Some("--help" | "-h") => {
            answer(USAGE);
            ExitCode::SUCCESS
        }
        _ => {
            stencilfs::say!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
