//! Memory figures of the whole host.

mod accounting;
mod agreement;
mod backend_memory;
mod capacity;
mod counted_once;
mod dirty_exact;
mod jail;
mod kernel_decode;
mod kernel_decode_stress;
mod top;
