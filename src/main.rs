//! The `stencil` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: stencilfs::sys::alloc::OrEnd = stencilfs::sys::alloc::OrEnd;

fn main() -> ExitCode {
    stencilfs::sys::inherited::reset(false);
    stencilfs::cli::main()
}
