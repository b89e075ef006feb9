//! Scenarios that run alone on the host: they measure the whole host (free memory, merged pages, swap) or times, use
//! all its memory, or block scans of all processes.
//!
//! They form one module because the test harness runs tests in the order of their paths: the lock of the host then
//! changes hands only twice in a run.
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
