//! The initial state of a machine in a test: a mount without a server.

use std::path::PathBuf;
use std::time::Duration;

use stencilfs::control::{BackingKind, Cache, Chosen, MountOptions, OnDamage, ServeMode};
use stencilfs::json_log::LogFormat;
use stencilfs::units::Bytes;

use super::super::*;
use super::model::file;
use crate::supervisor::program::Program;

pub fn initial() -> InitialState {
    let limit = Bytes::new(2);
    InitialState {
        mount: MountFacts {
            options: MountOptions {
                store: "/store".into(),
                mountpoint: "/mnt".into(),
                serve: ServeMode::Auto,
                cache_dir: None,
                cache_size: None,
                hydrate_timeout: Duration::from_secs(30),
                watchdog: Duration::from_secs(10),
                scrub_interval: Duration::ZERO,
                on_damage: OnDamage::Eio,
                read_ahead: None,
                noexec: false,
                foreground: false,
                log_format: LogFormat::default(),
            },
            store_id: String::new(),
            device: 1,
            init: Vec::new(),
            init_reply: None,
            chosen: Chosen { kind: BackingKind::Copy, cache: Cache::Memory, why: None, most: limit },
            record: PathBuf::new(),
            counters_page: (0, 0),
        },
        program: Program::new(file()),
        backings: Backings::default(),
        server: None,
        leaving: Vec::new(),
        removal: Removal::default(),
        has_served: false,
        restarts: 0,
        draining: false,
        rings: 0,
    }
}
