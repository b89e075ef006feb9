//! The documentation, and the structure of the sources.

pub mod documented_commands;
pub mod documents;
pub mod layers;
