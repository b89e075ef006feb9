//! The `stencil` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: stencilfs::sys::memory::alloc::OrEnd = stencilfs::sys::memory::alloc::OrEnd;

fn main() -> ExitCode {
    stencilfs::sys::process::inherited::reset(false);
    stencilfs::cli::main()
}
