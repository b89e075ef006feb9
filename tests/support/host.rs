//! Who may use the host at the same time: a scenario that measures the whole host (free memory, KSM, swap)
//! runs alone, all others share it.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static HOST: RwLock<()> = RwLock::new(());

/// For scenarios that mount or launch processes.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    HOST.read().unwrap_or_else(PoisonError::into_inner)
}

/// For scenarios that measure the whole host or change its settings.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    HOST.write().unwrap_or_else(PoisonError::into_inner)
}
