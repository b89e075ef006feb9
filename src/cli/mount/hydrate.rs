//! Progress of hydration: the first open of a template waits until the template's backing is filled.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::clones::launch::Target;
use crate::control;
use crate::progress::Progress;
use crate::units::Bytes;

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Opens the template's memory as its clones will, and draws the progress of hydration until the open returns. Errors
/// are ignored here, because the clones will report the same errors.
pub fn show(target: &Target, progress: &dyn Progress, cancel: &AtomicBool) {
    let Some(memory) = target.files.iter().find(|file| file.kind.is_memory()) else { return };
    let path = target.dir.join(&memory.name);
    // The thread is not scoped: a scoped thread would be joined, and an interrupt must not wait for an open that does
    // not return.
    let opening = thread::spawn(move || drop(File::open(path)));
    let device = target.inodes.0;
    let hydrated = || -> Option<Bytes> {
        let mount = control::mounts().ok()?.into_iter().find(|mount| mount.device == device)?;
        let status = mount.status().ok()?;
        Some(status.templates.iter().find(|template| template.digest == target.digest)?.hydrated_bytes)
    };
    let mut shown: Option<Bytes> = None;
    while !opening.is_finished() && !cancel.load(Ordering::Relaxed) {
        thread::sleep(POLL_INTERVAL);
        let Some(now) = hydrated() else { continue };
        let before = shown.unwrap_or_else(|| {
            progress.start("hydrate", Some(memory.data_bytes));
            Bytes::ZERO
        });
        progress.advance(now.saturating_sub(before));
        shown = Some(now.max(before));
    }
    if shown.is_some() {
        progress.finish();
    }
}
