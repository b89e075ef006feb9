//! Memory: mappings, page tables, page cache, memory files, allocation.

#[cfg(feature = "internals")]
pub mod alloc;
#[cfg(feature = "internals")]
pub mod cachestat;
#[cfg(feature = "rust-vmm")]
pub mod guest_region;
#[cfg(feature = "internals")]
pub mod ksm;
pub mod mapped_file;
pub mod mapping;
#[cfg(feature = "internals")]
pub mod memfd;
#[cfg(feature = "internals")]
pub mod page_flags;
pub mod pagemap;
#[cfg(feature = "internals")]
pub mod process_memory;
#[cfg(feature = "internals")]
pub mod smaps;
pub mod userfault;
