//! Helpers of a launch or a capture: this program, run in another process.

use std::process::Command;

use crate::clones::registry;
use crate::sys::process::session::Session;

const THIS_PROGRAM: &str = "/proc/self/exe";

/// Returns a command that runs this program, even if its file was replaced meanwhile.
pub fn this_program() -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    // The caller's working directory would keep its file system busy.
    command.current_dir("/").env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command
}

/// Same as [`this_program`], in a new session.
pub fn session() -> Session {
    let mut session = Session::new(THIS_PROGRAM);
    session.current_dir("/").env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    session
}
