//! Clones: processes that map a template.
