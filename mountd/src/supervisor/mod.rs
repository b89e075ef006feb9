//! The supervisor: holds the state and the descriptors that must outlive a server, and starts a successor when a server
//! dies.
//!
//! The [`machine`] decides and makes no system call; the event loop in [`run`] waits for events, passes them to the
//! machine and executes the actions that the machine returns. The other modules carry out the actions: server
//! processes, jobs, callers of the control socket, signals, readers of damaged blocks, the service manager, the
//! measurements of the watchdog.

mod become_program;
pub mod cache;
pub mod callers;
mod damage;
mod event;
pub mod jobs;
mod kernel_decode;
pub mod machine;
pub mod program;
pub mod resources;
mod run;
mod server_process;
pub mod service_manager;
pub mod signals;
mod watchdog;

pub use run::{AcquiredMount, Supervisor};
