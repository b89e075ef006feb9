//! Virtual machine monitors: QEMU, Firecracker, libvirt, a KVM guest.

pub mod backend_explain;
pub mod backend_memory;
pub mod clone_qemu;
pub mod cloud_hypervisor;
pub mod example_vmm;
pub mod firecracker;
pub mod firecracker_guests;
pub mod kvm_guest;
pub mod libvirt_guest;
pub mod qemu_conformance;
pub mod qemu_random;
pub mod rom_guest;
pub mod vmm_args;
