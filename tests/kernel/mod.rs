//! Interfaces of the kernel.

pub mod interfaces;
