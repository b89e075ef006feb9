//! One scenario a file; `support` holds what they share.
mod layers;
mod qemu_conformance;
mod store_roundtrip;
mod support;
