//! Commands about mounts.

pub(super) mod attach;
pub(super) mod helper;
pub(super) mod hydrate;
pub(super) mod path;
pub(super) mod restart;
pub(super) mod status;
pub(super) mod stuck;
pub(super) mod umount;
pub(super) mod users;
