//! The supervisor: holds what must outlive a server, and starts the next server when one dies.
//!
//! The [`machine`] decides, without a system call; [`run`] is the loop around it that waits for events and executes
//! actions. The other modules are its hands: server processes, jobs, callers of the control socket, signals, the service
//! manager, the watchdog's measurements.

mod become_program;
pub mod cache;
pub mod callers;
mod event;
pub mod jobs;
pub mod machine;
pub mod program;
pub mod resources;
mod run;
mod server_process;
pub mod service_manager;
pub mod signals;
mod watchdog;

pub use run::{Supervisor, Taken};
