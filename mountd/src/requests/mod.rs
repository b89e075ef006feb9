//! What a supervisor is asked: by its server, and by callers of the control socket.

mod caller;
mod server;

pub use server::Pending;
