//! What a supervisor is asked: by its server, by callers of the control socket, and by signals.

mod caller;
mod end;
mod ended;
mod server;

pub use server::Pending;
