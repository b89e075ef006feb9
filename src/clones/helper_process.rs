//! Helpers of a launch or a capture: this program, run in another process.

use std::process::Command;

use crate::clones::registry;

/// Returns a command that runs this program, even if its file was replaced meanwhile.
pub fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    // The caller's working directory would keep its file system busy.
    command.current_dir("/").env("STENCIL_RUNTIME_DIR", registry::runtime_root());
    command
}
