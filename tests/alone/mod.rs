//! Scenarios that run alone on the host: they measure the whole host (free memory, merged pages, swap) or times, use
//! all its memory, or block scans of all processes.
//!
//! They form one module because the test harness runs tests in the order of their paths: the lock on the host then
//! changes between shared and exclusive only twice in a run.
mod failover;
mod firecracker_jails;
mod memory;
