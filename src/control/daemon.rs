//! Starts `stencil-mountd`.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::options::MountOptions;
use super::protocol::Failure;
use crate::error::{Error, Result};

const NAME: &str = "stencil-mountd";

/// Names another one.
const VARIABLE: &str = "STENCIL_MOUNTD";

/// The daemon's binary: what `STENCIL_MOUNTD` names, else the one beside this, else the first on the PATH.
///
/// # Errors
/// [`Code::NotFound`](crate::error::Code::NotFound) where the variable names no file, or there is none.
pub fn find_daemon() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
        // A name without a slash would be sought on the PATH when it is run.
        let named = std::path::absolute(&named).unwrap_or_else(|_| named.into());
        return if named.is_file() {
            Ok(named)
        } else {
            Err(Error::not_found(format!("{VARIABLE} names no file"))
                .at(named)
                .remedy("set it to a stencil-mountd, or unset it: the one beside stencil is taken then"))
        };
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join(NAME));
    beside.into_iter().chain(on_path).find(|p| p.is_file()).ok_or_else(|| {
        Error::not_found("stencil-mountd is not installed")
            .remedy("install it beside stencil or on the PATH, or name it in STENCIL_MOUNTD")
    })
}

/// Starts a supervisor in the background, and comes back when its mount answers.
///
/// # Errors
/// What the supervisor says why it cannot mount.
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
        // It writes one line and closes its end, or dies.
        out.read_to_string(&mut line).map_err(|e| Error::failed("cannot hear the supervisor").because(e))?;
    }
    match serde_json::from_str::<Option<Failure>>(line.trim()) {
        Ok(None) => Ok(()),
        Ok(Some(failure)) => {
            let _ = child.wait();
            Err(failure.into_error())
        }
        Err(_) => {
            let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
            Err(Error::failed(format!("the supervisor ended without a word ({status})"))
                .at(daemon)
                .remedy("run the same command with -f to see what it says"))
        }
    }
}

/// Becomes a supervisor in the foreground; comes back only when that fails.
pub fn become_supervisor(options: &MountOptions) -> Error {
    match find_daemon() {
        Ok(daemon) => {
            let error = Command::new(&daemon).args(options.to_args()).exec();
            Error::io("cannot start the supervisor", &daemon, error)
        }
        Err(error) => error,
    }
}
