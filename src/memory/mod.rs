//! Memory backends.
