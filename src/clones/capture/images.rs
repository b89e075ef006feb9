//! The disk images of a captured VM, and the operations of qemu-img on them.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::open_files::{FileId, HeldFiles};
use crate::clones::recipe::PlannedDisk;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::process::{die_with_starter, inherit, own_session};

/// The image below an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Path of the image on the host.
    pub place: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Identity of the file: QEMU reopens images by path when they become read-only or writable, and the path may then
    /// lead to another file.
    pub id: FileId,
}

/// Creates an empty overlay of an image, with the owner and mode of the image.
///
/// qemu-img inherits `hold`, the pipe to the watchdog of the capture: if this process is killed, the watchdog starts
/// its cleanup only after qemu-img has exited.
///
/// # Errors
/// Returns an error if qemu-img cannot create the overlay, or its owner or mode cannot be set.
pub fn create(overlay: &Path, image: &Image, hold: Option<OwnedFd>) -> Result<()> {
    // A relative backing file name is valid for every root directory; `./` keeps a colon from being taken for a
    // protocol.
    let mut backing = std::ffi::OsString::from("./");
    backing.push(image.place.file_name().unwrap_or_default());
    // qemu-img outlives this process: a partly created overlay could not be distinguished from a damaged overlay.
    let mut command = Command::new("qemu-img");
    own_session(&mut command);
    command.args(["create", "-q", "-u", "-f", "qcow2", "-F", &image.format, "-b"]).arg(backing).arg(overlay);
    if let Some(hold) = hold {
        inherit(&mut command, hold);
    }
    run(command.arg(image.size.to_string()), None).inspect_err(|_| {
        // No QEMU has the overlay open yet.
        let _ = fs::remove_file(overlay);
    })?;
    let failed = |e| Error::io("cannot set the owner and mode of the overlay", overlay, e);
    let owner = fs::metadata(&image.place).map_err(failed)?;
    std::os::unix::fs::chown(overlay, Some(owner.uid()), Some(owner.gid())).map_err(failed)?;
    fs::set_permissions(overlay, owner.permissions()).map_err(failed)
}

/// Commits an overlay that no process has open into its image.
///
/// # Errors
/// Returns an error if qemu-img fails.
pub fn commit(overlay: &Path) -> Result<()> {
    run(qemu_img().args(["commit", "-q", "-f", "qcow2"]).arg(overlay), None)
}

/// Returns true if an overlay has data.
///
/// # Errors
/// Returns an error if qemu-img fails.
pub fn has_data(overlay: &Path) -> Result<bool> {
    let file = json!({"driver": "file", "filename": overlay.to_string_lossy()});
    let alone = json!({"driver": "qcow2", "backing": null, "file": file});
    let mut command = qemu_img();
    command
        .args(["map", "--output=json", "-U", &format!("json:{alone}")])
        .current_dir("/")
        .stdin(Stdio::null());
    let done = command.output().map_err(cannot_start)?;
    let map: Option<Vec<Value>> = serde_json::from_slice(&done.stdout).ok().filter(|_| done.status.success());
    let Some(map) = map else {
        let reason = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
        return Err(Error::failed(format!("qemu-img cannot read the overlay ({}): {reason}", done.status))
            .at(overlay)
            .hint("check the reason that qemu-img reports"));
    };
    Ok(map.iter().any(|part| part.get("present").and_then(Value::as_bool) != Some(false)))
}

/// Opens the contents of a disk: the image file itself, or a raw copy of the guest-visible contents in the store.
///
/// The image must not change meanwhile. The image is read through descriptors of this process, so that renames have no
/// effect.
///
/// # Errors
/// Returns an error if the image cannot be read or the store has no space for the copy.
pub fn contents(
    disk: &PlannedDisk,
    images: &HeldFiles,
    store: &Store,
    interrupt: &AtomicBool,
) -> Result<File> {
    if disk.is_verbatim() {
        let path = images.place(&disk.live.image.path)?;
        return File::open(&path).map_err(|e| Error::io("cannot open the VM's disk", &path, e));
    }
    let copy = store.temporary_file()?;
    copy.set_len(disk.live.image.size)
        .map_err(|e| Error::io("cannot create a temporary file", store.dir(), e))?;
    let mut command = qemu_img();
    let chain = disk.live.image.to_json(&|path| images.place(path))?;
    let source = format!("json:{chain}");
    // The copy has no name, so a killed capture leaves no file behind.
    let target = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&copy));
    command.args(["convert", "-q", "-U", "-n", "--target-is-zero", "-O", "raw", &source, &target]);
    run(&mut command, Some(interrupt)).map_err(|e| e.context(format!("cannot read disk {}", disk.name)))?;
    Ok(copy)
}

/// Checks that qemu-img can be run.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if qemu-img is not installed, and another error if it
/// fails.
pub fn check_qemu_img() -> Result<()> {
    run(qemu_img().arg("--version"), None)
}

/// Returns a qemu-img command in its own session (no signals from the terminal), which is killed when this process
/// dies.
fn qemu_img() -> Command {
    let mut command = Command::new("qemu-img");
    die_with_starter(own_session(&mut command));
    command
}

fn cannot_start(e: std::io::Error) -> Error {
    Error::io("cannot start", "qemu-img", e)
        .hint("install qemu-img (Debian: qemu-utils) in a directory of PATH")
}

/// Runs qemu-img and waits for its exit.
fn run(command: &mut Command, interrupt: Option<&AtomicBool>) -> Result<()> {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(cannot_start)?;
    let failed = |e| Error::failed("cannot wait for qemu-img").because(e);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            if status.success() {
                return Ok(());
            }
            let mut output = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut stderr, &mut output);
            }
            let lines: Vec<&str> = output.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
            return Err(Error::failed(format!("qemu-img failed ({status}): {}", lines.join("; ")))
                .hint("check the free space of the file system and the permissions of the image"));
        }
        if interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::failed("interrupted: no template was created"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
