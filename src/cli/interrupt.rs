//! SIGINT and SIGTERM as a flag, for commands that must remove their temporary files.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// Returns a flag that the first SIGINT or SIGTERM sets. The second signal terminates the process immediately.
///
/// # Errors
/// Returns an error if a handler cannot be installed.
pub fn flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
            .map_err(|e| Error::failed("cannot handle signals").because(e))?;
    }
    Ok(flag)
}
