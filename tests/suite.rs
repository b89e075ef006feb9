//! One scenario a file; `support` holds what they share.
mod accounting;
mod backend_memory;
mod command_line;
mod dirty_exact;
mod kvm_guest;
mod layers;
mod mount_damage;
mod mount_kill;
mod mount_reads;
mod mount_refusals;
mod mount_serving;
mod qemu_conformance;
mod store_crash;
mod store_damage;
mod store_limits;
mod store_roundtrip;
mod support;
