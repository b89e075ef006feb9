//! A sender that is silent.

/// What to do about it.
pub(super) const REMEDY: &str = "see whether the sender still runs and its link is up, then run it again from the start; \
                                 --stall-timeout SECONDS waits longer, 0 without end";
