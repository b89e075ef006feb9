//! Unix sockets and poll(2).

pub mod peer;
pub mod poll;
pub mod unix;
