//! Deaths, restarts and takeovers of servers and supervisors; outages; hostile servers.

pub mod attempt;
pub mod damaged_block;
pub mod dead_mount;
pub mod hostile_server;
pub mod in_flight;
pub mod kill;
pub mod restart;
pub mod runtime_directory_hostile;
pub mod sandbox;
pub mod store_outage;
pub mod stuck_connection;
pub mod take_over;
pub mod time_namespace;
