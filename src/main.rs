//! The `stencil` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    stencilfs::cli::main()
}
