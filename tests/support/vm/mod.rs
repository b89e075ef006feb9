//! Virtual machine monitors and their guests.

pub mod cloud_hypervisor;
pub mod firecracker;
pub mod guest;
pub mod kvm;
pub mod libvirt;
pub mod object_files;
pub mod qemu_object;
