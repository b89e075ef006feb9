//! What a scenario has for as long as it lasts, and gives back also when it fails.

use std::path::PathBuf;
use std::process::Child;

use rustix::mount::{UnmountFlags, unmount};

/// A process that is killed when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is mounted there is taken away when dropped.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}
