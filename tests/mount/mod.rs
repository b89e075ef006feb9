//! Mounts: their places, the operations that they serve and refuse, and their end.

pub mod bad_input;
pub mod cache_trouble;
pub mod damage;
pub mod kernel_decode;
pub mod leaks;
pub mod many_tags;
pub mod own_paths;
pub mod places;
pub mod read_only_store;
pub mod reads;
pub mod refusals;
pub mod residency;
pub mod serving;
pub mod unmount;
