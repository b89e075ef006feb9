//! Restores a captured VM. QEMU: resumes the guest, then restores the migration settings, then the disks. Firecracker:
//! resumes the guest, then removes temporary files. Used by the capture itself, and by the watchdog of a capture that
//! was killed.

use std::cell::RefCell;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::disks::{self, Frozen};
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::Qmp;
use crate::clones::vmm_api::Api;
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::process::ProcessId;

/// How long a step of the restore is retried.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeout for the exit of a QEMU process after its QMP session has ended.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of a QEMU VM before the capture changed the VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedState {
    /// True if the guest was running.
    pub ran: bool,
    /// The migration settings.
    pub settings: Settings,
    /// Disks that are frozen, or will be.
    pub disks: Vec<Frozen>,
}

impl SavedState {
    /// Resumes the guest, unless `stay` is set, and restores QEMU's migration settings. Returns the time of the resume.
    ///
    /// # Errors
    /// Returns the last error of QEMU if a step fails for 30 s.
    pub fn restore_guest(&self, qmp: &mut Qmp, vm: ProcessId, stay: bool) -> Result<Instant> {
        // The migration of the device state ends as failed or completed. Until its end the migration can stop the guest
        // again, and QEMU refuses to change capabilities.
        if self.ran && !stay {
            retry_in_session(qmp, vm, resume)?;
        }
        let resumed = Instant::now();
        retry_in_session(qmp, vm, |qmp| self.settings.apply(qmp))?;
        Ok(resumed)
    }

    /// Restores the disks, through QEMU or, if QEMU has exited, through qemu-img. `interrupt` ends the wait for a
    /// commit, which QEMU then continues.
    ///
    /// # Errors
    /// Returns an error if the last writes of the guest are not in its image; the message names the overlay that has
    /// them.
    pub fn restore_disks(&self, qmp: &mut Qmp, vm: ProcessId, interrupt: Option<&AtomicBool>) -> Result<()> {
        match disks::restore(qmp, &self.disks, interrupt) {
            // QEMU has exited meanwhile, by a shutdown of the guest or a signal.
            Err(_) if has_exited(qmp, vm) => self.restore_without_vm(),
            other => other,
        }
    }

    /// Restores the disks of a VM whose QEMU has exited.
    ///
    /// # Errors
    /// Same as [`restore_disks`](Self::restore_disks).
    pub fn restore_without_vm(&self) -> Result<()> {
        disks::restore_without_vm(&self.disks)
    }
}

/// The state of a Firecracker VM that a capture restores: the run state, and the files that the capture creates for a
/// Firecracker that cannot open files without a name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedMicrovm {
    /// True if the capture has paused the guest, or is about to pause the guest.
    pub paused: bool,
    /// Names of temporary files. Empty if the files have no names.
    pub files: Vec<String>,
    /// Number of the descriptor of their directory in the helper.
    pub directory: Option<RawFd>,
}

impl SavedMicrovm {
    /// Resumes the guest if the capture has paused the VM. Returns after Firecracker has executed all earlier requests.
    /// Uses a new connection, because an earlier one may still wait for a reply.
    ///
    /// # Errors
    /// Returns an error if another process listens on the socket, or if Firecracker does not resume the guest.
    pub fn resume(&self, socket: &Path, vm: ProcessId) -> Result<()> {
        let mut api = Api::of_process(socket, vm)?;
        if self.paused && api.state()? != "running" {
            api.set_state("Resumed")?;
        }
        match api.state()?.as_str() {
            state if self.paused && state != "running" => {
                Err(Error::failed(format!("the VM is in state '{state}' after its resume"))
                    .at(socket)
                    .hint("resume the VM with PATCH /vm"))
            }
            _ => Ok(()),
        }
    }

    /// Restores the VM of a capture that was killed, and removes its files. `retry` repeats the resume while the VM
    /// lives.
    ///
    /// # Errors
    /// Same as [`resume`](Self::resume).
    pub fn restore(
        &self,
        socket: &Path,
        vm: ProcessId,
        retry: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let restored = retry(&mut || self.resume(socket, vm));
        // Firecracker has executed all requests or has exited, and creates no more files.
        if let Some(number) = self.directory {
            match Directory::open(&PathBuf::from(format!("/proc/self/fd/{number}"))) {
                Ok(directory) => self.remove_files_in(&directory),
                Err(e) => log::warn!("cannot remove the temporary files {}: {e}", self.files.join(" ")),
            }
        }
        restored
    }

    /// Removes the files from their directory.
    pub fn remove_files_in(&self, directory: &Directory) {
        for name in &self.files {
            match directory.remove_file(name) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    log::warn!(
                        "cannot remove the temporary file {name} in the directory of Firecracker: {e}"
                    );
                }
                _ => {}
            }
        }
    }
}

/// Returns true if QEMU has exited; waits up to 5 s for a QEMU that has closed its session.
fn has_exited(qmp: &mut Qmp, vm: ProcessId) -> bool {
    !vm.is_alive() || (qmp.status().is_err() && vm.wait_for_exit(EXIT_TIMEOUT).unwrap_or(false))
}

/// Resumes the guest, and checks that no active migration can stop it again.
fn resume(qmp: &mut Qmp) -> Result<()> {
    let refused = qmp.run("cont", json!({})).err();
    let (phase, is_idle) = migration::phase(qmp)?;
    let status = qmp.status()?;
    // Other states (`shutdown`, `io-error`…) do not come from the capture, and QEMU may refuse `cont` in them.
    match is_idle && !matches!(status.as_str(), "paused" | "prelaunch" | "postmigrate" | "finish-migrate") {
        true => Ok(()),
        false => Err(refused.unwrap_or_else(|| {
            Error::try_again(format!(
                "cannot resume the guest: the VM is in state '{status}', its migration in state '{phase}'"
            ))
            .hint("resume the guest with QMP cont")
        })),
    }
}

/// Retries `attempt` for up to 30 s, while the VM is alive and the session usable.
fn retry_in_session<T>(
    qmp: &mut Qmp,
    vm: ProcessId,
    mut attempt: impl FnMut(&mut Qmp) -> Result<T>,
) -> Result<T> {
    let qmp = RefCell::new(qmp);
    let may_retry = || vm.is_alive() && !qmp.borrow().is_lost();
    retry_while(may_retry, || attempt(&mut qmp.borrow_mut()))
}

/// Retries `attempt` for up to 30 s, while the VM is alive.
pub fn retry<T>(vm: ProcessId, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    retry_while(|| vm.is_alive(), attempt)
}

/// Retries `attempt` for up to 30 s, while `may_retry` returns true.
pub fn retry_while<T>(may_retry: impl Fn() -> bool, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + RETRY_TIMEOUT;
    let mut pause = Duration::from_millis(20);
    loop {
        match attempt() {
            Err(_) if Instant::now() < until && may_retry() => std::thread::sleep(pause),
            outcome => return outcome,
        }
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Restores a VM that is paused. Returns the requests other than GET.
    fn requests(paused: bool) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut state, mut changes, mut buffer) = ("Paused", vec![], [0; 4096]);
            loop {
                let got = stream.read(&mut buffer).unwrap();
                if got == 0 {
                    return changes;
                }
                let request = String::from_utf8_lossy(&buffer[..got]).into_owned();
                let body = format!("{{\"state\": \"{state}\"}}");
                if !request.starts_with("GET ") {
                    changes.push(request);
                    state = "Running";
                }
                let reply = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(reply.as_bytes()).unwrap();
            }
        });
        let before = SavedMicrovm { paused, files: vec![], directory: None };
        before.resume(&path, ProcessId::current().unwrap()).unwrap();
        server.join().unwrap()
    }

    #[test]
    fn a_guest_that_another_client_has_paused_stays_paused() {
        assert_eq!(requests(false), Vec::<String>::new());
        let changes = requests(true);
        assert!(changes.len() == 1 && changes[0].contains("Resumed"), "{changes:?}");
    }
}
