//! Commands about clones and their memory.

pub(super) mod args;
pub(super) mod capacity;
pub(super) mod capture;
pub(super) mod check;
pub(super) mod clone;
pub(super) mod density;
pub(super) mod dirty;
pub(super) mod explain;
mod launch_set;
pub(super) mod logs;
pub(super) mod ps;
pub(super) mod stop;
pub(super) mod warm;
pub(super) mod working_set;
