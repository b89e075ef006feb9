//! `stencil-mountd`: supervisor and server of one Stencil mount.
//!
//! ```text
//!   stencil mount ──starts──▶ supervisor: holds the mount, the counters page, the backings, the control socket
//!                                │ starts, and starts again when it dies
//!                                ▼
//!                             server: speaks FUSE; knows nothing that a successor could not find again
//! ```

mod attr;
mod backing;
mod control;
mod decode;
mod errno;
mod fuse;
mod hydrate;
mod inflight;
mod link;
mod passthrough;
mod replies;
mod sandbox;
mod server;
mod stats;
mod supervisor;
mod tree;

use std::process::ExitCode;

use stencilfs::control::MountOptions;

const USAGE: &str = "\
stencil-mountd serves a Stencil store through FUSE. It is started by `stencil mount`.

usage: stencil-mountd supervise --store=DIR [--serve=auto|passthrough|decode] [--cache-dir=DIR]
                      [--cache-size=BYTES] [--hydrate-timeout=SECONDS] [--noexec] -- MOUNTPOINT
       stencil-mountd --version";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let command = args.next().unwrap_or_default();
    let level = env_logger::Env::new().filter_or("STENCIL_LOG", "info");
    let mut log = env_logger::Builder::from_env(level);
    log.format_timestamp_millis().filter_module("fuser", log::LevelFilter::Warn);
    match command.to_str() {
        Some("supervise") => {
            log.init();
            match MountOptions::from_args(args) {
                Ok(options) => supervisor::main(options),
                Err(error) => {
                    eprintln!("stencil-mountd: {error}\n{USAGE}");
                    ExitCode::from(error.code().exit_code())
                }
            }
        }
        Some("serve") => {
            log.init();
            server::main()
        }
        Some("attempt") => {
            log.init();
            sandbox::attempt::main(args)
        }
        Some("--version") => {
            println!("stencil-mountd {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--help" | "-h") => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
