//! Scenarios that need the host for themselves: they measure it as a whole (free memory, merged pages, swap), measure
//! times, take all its memory, or keep other scenarios from looking at every process.
//!
//! They are one module because the test harness runs modules one after the other: the host changes hands twice in a run.
mod accounting;
mod backend_memory;
mod counted_once;
mod crowds;
mod dirty_exact;
mod hostile_server;
mod jail;
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
