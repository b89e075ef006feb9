//! Advice for a stalled sender, which sends no bytes for the stall timeout.

/// Hint of a stall error.
pub(in crate::store) const REMEDY: &str = "check that the sender is running and its link is up, then run the command again from the \
                                 start; --stall-timeout SECONDS sets a longer timeout, 0 disables it";
