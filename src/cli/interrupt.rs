//! SIGINT and SIGTERM as a flag, for work that cleans up behind itself.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// A flag that becomes true with the first SIGINT or SIGTERM; the second one ends the process at once.
///
/// # Errors
/// When a handler cannot be installed.
pub fn flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
            .map_err(|e| Error::failed("cannot handle signals").because(e))?;
    }
    Ok(flag)
}
