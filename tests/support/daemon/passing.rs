//! Guards: objects of a scenario that are released on drop, also when the scenario fails.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use stencilfs::sys::process::ProcessId;

use crate::support::mount::run;

/// A process that is killed on drop.
pub struct Running(pub Child);

impl Running {
    /// Starts a process; its standard output and standard error go to `log`.
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

/// A process stopped by SIGSTOP, continued on drop.
pub struct StoppedProcess(ProcessId);

impl StoppedProcess {
    /// Stops a process.
    pub fn stop(process: ProcessId) -> StoppedProcess {
        assert!(process.signal(Signal::STOP).unwrap());
        StoppedProcess(process)
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

/// A directory in which nothing can be created, renamed or removed (chattr +i) until drop.
pub struct Immutable(PathBuf);

impl Immutable {
    /// Makes a directory immutable.
    pub fn make(directory: &Path) -> Immutable {
        run("chattr", &["+i", directory.to_str().unwrap()]);
        Immutable(directory.to_owned())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

/// A mount point that is unmounted (lazily) on drop.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Sets a flag on drop. Threads that run until the flag is set end also when the thread with this guard panics.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
