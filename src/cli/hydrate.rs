//! The first open of a template waits until its backing is filled: shows how far that is.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::clones::launch::Target;
use crate::control;
use crate::progress::Progress;
use crate::units::Bytes;

const GLANCE: Duration = Duration::from_millis(50);

/// Opens the template's memory as its clones will, and draws the filling of its backings until that open is
/// answered. What goes wrong is left to the clones, which meet it again.
pub fn show(target: &Target, progress: &dyn Progress, cancel: &AtomicBool) {
    let Some(memory) = target.files.iter().find(|file| file.kind.is_memory()) else { return };
    let path = target.dir.join(&memory.name);
    // Not a scoped thread: an interrupt must not wait for the answer of a mount.
    let opening = thread::spawn(move || drop(File::open(path)));
    let device = target.inodes.0;
    let hydrated = || -> Option<Bytes> {
        let mount = control::mounts().ok()?.into_iter().find(|mount| mount.device == device)?;
        let status = mount.status().ok()?;
        Some(status.templates.iter().find(|template| template.digest == target.digest)?.hydrated_bytes)
    };
    let mut shown: Option<Bytes> = None;
    while !opening.is_finished() && !cancel.load(Ordering::Relaxed) {
        thread::sleep(GLANCE);
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
