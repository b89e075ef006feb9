//! Failover drills, and scenarios that block or exhaust the host.

mod crowds;
mod hostile_server;
mod kill_clones;
mod kill_kvm;
mod kill_passthrough;
mod kill_qemu;
mod kill_reads;
mod kill_stops;
mod restart;
mod server_memory;
mod stuck_process;
mod take_over;
