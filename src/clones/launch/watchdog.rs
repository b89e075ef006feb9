//! Outlives a command that is killed, and clears up after it.
//!
//! The command holds the other end of the watchdog's standard input. When that ends, for whatever reason,
//! the watchdog of a launch ends every clone that was not let go; the one of a capture lets the VM run again
//! unless it was dismissed.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::clones::qmp::Qmp;
use crate::clones::registry::{self, Launch};
use crate::error::{Error, Result};
use crate::sys::process::own_session;

/// The argument that makes this program a watchdog.
pub const ARGUMENT: &str = "launch-watchdog";

/// The argument that makes this program the watchdog of a capture.
pub const RESUME_ARGUMENT: &str = "capture-watchdog";

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

/// Lets a VM run again if this process dies while the VM stands still for it.
#[derive(Debug)]
pub struct ResumeOnDeath(Child);

impl ResumeOnDeath {
    /// Begins to watch over the VM behind that QMP socket.
    ///
    /// # Errors
    /// When this program cannot be started.
    pub fn start(socket: &Path) -> Result<ResumeOnDeath> {
        let mut command = this_program();
        own_session(&mut command)
            .arg(RESUME_ARGUMENT)
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let child =
            command.spawn().map_err(|e| Error::failed("cannot start the VM's watchdog").because(e))?;
        Ok(ResumeOnDeath(child))
    }

    /// The VM is as it should be.
    pub fn dismiss(mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(b"x");
        }
        let _ = self.0.wait();
    }
}

/// The whole life of a capture's watchdog.
pub fn resume_main(socket: Option<OsString>) -> ExitCode {
    let Some(socket) = socket else { return ExitCode::from(2) };
    let mut byte = [0];
    if matches!(std::io::stdin().read(&mut byte), Ok(1..)) {
        return ExitCode::SUCCESS;
    }
    // First of all the guest runs. A device state that was cut off ends as a failed migration, within moments;
    // until then QEMU refuses to change a capability, and may refuse to go on.
    let resumed = insist(|| Qmp::connect(Path::new(&socket))).and_then(|mut qmp| {
        insist(|| qmp.run("cont", json!({})))?;
        insist(|| qmp.ignore_shared(false))
    });
    match resumed {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stencil: the VM could not be let run again: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Tries until it goes well, for half a minute.
fn insist<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match attempt() {
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            outcome => return outcome,
        }
    }
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
            eprintln!("stencil: {error}");
            ExitCode::FAILURE
        }
    }
}
