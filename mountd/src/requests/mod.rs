//! Requests to the supervisor: of its server, of callers of the control socket, and by signals.

mod caller;
mod condemn;
mod end;
mod ended;
mod server;

pub use condemn::Condemned;
pub use server::Pending;
