//! One scenario a file; `support` holds what they share.
mod layers;
mod support;
