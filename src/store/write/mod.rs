//! Writing templates: import, packs, tables, the commit that publishes them.

pub(super) mod block_index;
pub(super) mod commit;
pub(super) mod import;
pub(super) mod ordered;
pub(super) mod pack_writer;
pub(super) mod stall;
pub(super) mod tables;
