//! One scenario a file; `support` holds what they share.
mod layers;
mod store_roundtrip;
mod qemu_conformance;
mod support;
