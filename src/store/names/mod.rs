//! Names of templates: tags, references, inode numbers; and the policy, with the working sets.

pub(super) mod owner;
pub(super) mod policy;
pub(super) mod reference;
pub(super) mod serving;
pub(super) mod tags;
pub(super) mod working_set;
