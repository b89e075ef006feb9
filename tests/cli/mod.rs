//! The command line, its documentation, and the structure of the sources.

pub mod arguments;
pub mod command_line;
pub mod compatibility;
pub mod demo;
pub mod doctor;
pub mod documented_commands;
pub mod documents;
pub mod habits;
pub mod inherited;
pub mod layers;
pub mod output_files;
pub mod owners;
pub mod progress;
pub mod references;
pub mod tables;
