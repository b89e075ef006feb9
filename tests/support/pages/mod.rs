//! The documentation and the source code as text.

pub mod imports;
pub mod page;
pub mod session;
pub mod svg;
pub mod tables;
