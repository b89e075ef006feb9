//! The template store.
