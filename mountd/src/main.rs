//! `stencil-mountd`: supervisor and server of one Stencil mount.
fn main() {}
