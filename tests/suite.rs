//! One scenario a file; `support` holds what they share.
mod support;
