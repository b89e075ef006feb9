//! Starts `stencil-mountd`.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::control::protocol::messages::Failure;
use crate::control::protocol::options::MountOptions;
use crate::error::{Error, Result};
use crate::sys::process::search_path::find_program;

const NAME: &str = "stencil-mountd";

/// Environment variable with the path of another daemon.
const VARIABLE: &str = "STENCIL_MOUNTD";

/// Returns the path of the daemon: `$STENCIL_MOUNTD`, else `stencil-mountd` beside this program, else the first
/// `stencil-mountd` in `PATH`.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if there is no daemon, or the variable does not name a
/// file.
pub fn find_daemon() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
        // `exec` would look up a name without a slash in PATH.
        let named = std::path::absolute(&named).unwrap_or_else(|_| named.into());
        return if named.is_file() {
            Ok(named)
        } else {
            Err(Error::not_found(format!("{VARIABLE} does not name a file")).at(named).hint(
                "set the variable to the path of stencil-mountd, or unset it to use the program beside \
                    stencil",
            ))
        };
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    beside.filter(|path| path.is_file()).or_else(|| find_program(NAME)).ok_or_else(|| {
        Error::not_found("stencil-mountd is not installed").hint(
            "install stencil-mountd beside stencil or in a directory of PATH, or set STENCIL_MOUNTD to \
                its path",
        )
    })
}

/// Starts a supervisor in the background and waits until its mount serves requests.
///
/// # Errors
/// Returns the error that the supervisor reports.
pub fn start_supervisor(options: &MountOptions) -> Result<()> {
    let daemon = find_daemon()?;
    let mut child = Command::new(&daemon)
        .args(options.to_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| Error::io("cannot start the supervisor", &daemon, e))?;
    let mut line = String::new();
    if let Some(mut out) = child.stdout.take() {
        // The supervisor writes one line and closes its end, or dies.
        out.read_to_string(&mut line)
            .map_err(|e| Error::failed("cannot read the supervisor's report").because(e))?;
    }
    match serde_json::from_str::<Option<Failure>>(line.trim()) {
        Ok(None) => Ok(()),
        Ok(Some(failure)) => {
            let _ = child.wait();
            Err(failure.into_error())
        }
        Err(_) => {
            let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
            Err(Error::failed(format!("the supervisor exited without a report ({status})"))
                .at(daemon)
                .hint("run the same command with -f to see the output of the supervisor"))
        }
    }
}

/// Executes the supervisor in place of this process, in the foreground; returns only if that fails.
pub fn exec_supervisor(options: &MountOptions) -> Error {
    match find_daemon() {
        Ok(daemon) => {
            let error = Command::new(&daemon).args(options.to_args()).exec();
            Error::io("cannot start the supervisor", &daemon, error)
        }
        Err(error) => error,
    }
}
