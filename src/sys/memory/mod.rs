//! Memory: mappings, page tables, page cache, memory files, allocation.

pub mod alloc;
pub mod cachestat;
pub mod mapped_file;
pub mod mapping;
pub mod memfd;
pub mod page_flags;
pub mod pagemap;
