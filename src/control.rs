//! The words between `stencil` and `stencil-mountd`.
