//! Outlives a command that is killed, and clears up after it.
//!
//! The command holds the other end of the watchdog's standard input. When that ends, for whatever reason,
//! the watchdog ends every clone that was not let go.

use std::ffi::OsString;
use std::io::Read;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use crate::clones::registry::{self, Launch};
use crate::error::{Error, Result};
use crate::sys::process::own_session;

/// The argument that makes this program a watchdog.
pub const ARGUMENT: &str = "launch-watchdog";

/// Tells the watchdog, when dropped, that the launch is over, and waits for its end.
pub struct Watchdog(Child);

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Starts the watchdog of a launch.
///
/// # Errors
/// When this program cannot be started.
pub fn start(launch: &Launch) -> Result<Watchdog> {
    let mut command = this_program();
    own_session(&mut command).args([ARGUMENT, launch.id()]).stdin(Stdio::piped()).stdout(Stdio::null());
    let child =
        command.spawn().map_err(|e| Error::failed("cannot start the launch's watchdog").because(e))?;
    Ok(Watchdog(child))
}

/// This very program, even if its file was replaced meanwhile.
pub fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    // Not the caller's folder, which somebody may want to unmount.
    command.current_dir("/").env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command
}

/// The watchdog's whole life.
pub fn main(launch: Option<OsString>) -> ExitCode {
    let Some(launch) = launch.and_then(|l| l.into_string().ok()) else { return ExitCode::from(2) };
    let mut byte = [0];
    while matches!(std::io::stdin().read(&mut byte), Ok(1..)) {}
    if !registry::is_held(&launch) {
        return ExitCode::SUCCESS;
    }
    // A child between fork and exec does not show whose it is: it gets the time to come through.
    std::thread::sleep(Duration::from_millis(100));
    match registry::abort(&launch) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("stencil: {error}");
            ExitCode::FAILURE
        }
    }
}
