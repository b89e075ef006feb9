//! What a scenario has for as long as it lasts, and gives back also when it fails.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use super::mount::run;

/// A process that is killed when dropped.
pub struct Running(pub Child);

impl Running {
    /// Starts it; what it says goes into the file.
    pub fn start(command: &mut Command, log: &Path) -> Running {
        let log = File::create(log).unwrap();
        Running(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that stands still, and goes on when dropped: nobody waits for it for ever.
pub struct StandsStill(ProcessId);

impl StandsStill {
    /// Stops it.
    pub fn stop(process: ProcessId) -> StandsStill {
        assert!(process.signal(Signal::STOP).unwrap());
        StandsStill(process)
    }
}

impl Drop for StandsStill {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

/// A folder in which nothing can be made, renamed or removed, until this is dropped.
pub struct Immutable(PathBuf);

impl Immutable {
    /// Makes it so.
    pub fn make(folder: &Path) -> Immutable {
        run("chattr", &["+i", folder.to_str().unwrap()]);
        Immutable(folder.to_owned())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

/// What is mounted there is taken away when dropped.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Ends the threads that go on until this is true, also when the one that has it panics: they would go on for ever.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
