//! The `stencil` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: stencilfs::sys::memory::alloc::ExitOnOom = stencilfs::sys::memory::alloc::ExitOnOom;

fn main() -> ExitCode {
    stencilfs::sys::process::inherited::reset(false);
    stencilfs::cli::main()
}
