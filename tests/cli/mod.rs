//! The command line.

pub mod arguments;
pub mod command_line;
pub mod compatibility;
pub mod demo;
pub mod doctor;
pub mod habits;
pub mod inherited;
pub mod output_files;
pub mod owners;
pub mod progress;
pub mod references;
pub mod tables;
