//! `--serve kernel`: the kernel decodes the packs after all blocks of a file are verified.

pub mod bytes;
pub mod damage;
pub mod hosts;
pub mod sealed;
