//! Commands about templates and the store.

pub(super) mod chmod;
pub(super) mod export;
pub(super) mod import;
pub(super) mod inspect;
pub(super) mod load;
pub(super) mod ls;
pub(super) mod maintain;
pub(super) mod recipe;
pub(super) mod rm;
pub(super) mod save;
pub(super) mod tag;
