//! What qemu-img does with the images of a VM that is captured.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::disks::Image;
use super::open_files::HeldFiles;
use crate::clones::recipe::PlannedDisk;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::process::{die_with_starter, inherit, own_session};

/// Makes an empty overlay over an image, for whoever may write to that. `hold` goes with qemu-img: whoever clears up
/// after this process waits until that is gone and makes no more file.
///
/// # Errors
/// When there can be no file beside the image.
pub fn make(overlay: &Path, image: &Image, hold: Option<OwnedFd>) -> Result<()> {
    // Both lie in one folder, whoever looks from wherever; `./` because a name may hold a colon.
    let mut backing = std::ffi::OsString::from("./");
    backing.push(image.place.file_name().unwrap_or_default());
    // It is done in a moment and outlives this process: an overlay that is half made could not be told from one that is
    // damaged.
    let mut command = Command::new("qemu-img");
    own_session(&mut command);
    command.args(["create", "-q", "-u", "-f", "qcow2", "-F", &image.format, "-b"]).arg(backing).arg(overlay);
    if let Some(hold) = hold {
        inherit(&mut command, hold);
    }
    run(command.arg(image.size.to_string()), None).inspect_err(|_| {
        // No QEMU has it.
        let _ = fs::remove_file(overlay);
    })?;
    let failed = |e| Error::io("cannot give the overlay to the image's owner", overlay, e);
    let owner = fs::metadata(&image.place).map_err(failed)?;
    std::os::unix::fs::chown(overlay, Some(owner.uid()), Some(owner.gid())).map_err(failed)?;
    fs::set_permissions(overlay, owner.permissions()).map_err(failed)
}

/// Brings into its image what an overlay holds that nobody has open.
///
/// # Errors
/// When qemu-img cannot do it.
pub fn commit(overlay: &Path) -> Result<()> {
    run(qemu_img().args(["commit", "-q", "-f", "qcow2"]).arg(overlay), None)
}

/// True when somebody has written to an overlay.
///
/// # Errors
/// When qemu-img cannot tell.
pub fn is_written(overlay: &Path) -> Result<bool> {
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
        let words = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
        return Err(Error::failed(format!("qemu-img cannot read the overlay ({}): {words}", done.status))
            .at(overlay)
            .remedy("the words are qemu-img's"));
    };
    Ok(map.iter().any(|part| part.get("present").and_then(Value::as_bool) != Some(false)))
}

/// The bytes of a disk as the guest saw them, without its chain; or the image as it is. The image stands still, and is
/// read through descriptors of this process, so that its names do not matter.
///
/// # Errors
/// When it cannot be read, or the folder has no room for a copy.
pub fn contents(
    disk: &PlannedDisk,
    images: &HeldFiles,
    store: &Store,
    interrupt: &AtomicBool,
) -> Result<File> {
    if disk.as_it_is() {
        let path = images.place(&disk.live.image.path)?;
        return File::open(&path).map_err(|e| Error::io("cannot open the VM's disk", &path, e));
    }
    let copy = store.temporary_file()?;
    copy.set_len(disk.live.image.size)
        .map_err(|e| Error::io("cannot make a temporary file", store.dir(), e))?;
    let mut command = qemu_img();
    let chain = disk.live.image.to_json(&|path| images.place(path))?;
    let source = format!("json:{chain}");
    // It reads and writes through descriptors of this process: nothing has a name that could be left behind.
    let target = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&copy));
    command.args(["convert", "-q", "-U", "-n", "--target-is-zero", "-O", "raw", &source, &target]);
    run(&mut command, Some(interrupt))
        .map_err(|e| e.context(format!("the disk {} cannot be read", disk.name)))?;
    Ok(copy)
}

/// Checks that it can be run.
///
/// # Errors
/// When it is not installed.
pub fn is_there() -> Result<()> {
    run(qemu_img().arg("--version"), None)
}

/// Reached by no key of a terminal, with no descriptor but those that it is to inherit; ends with this process.
fn qemu_img() -> Command {
    let mut command = Command::new("qemu-img");
    die_with_starter(own_session(&mut command));
    command
}

fn cannot_start(e: std::io::Error) -> Error {
    Error::io("cannot start", "qemu-img", e).remedy("install it (Debian: qemu-utils) and put it into PATH")
}

/// Runs qemu-img to its end.
fn run(command: &mut Command, interrupt: Option<&AtomicBool>) -> Result<()> {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(cannot_start)?;
    let failed = |e| Error::failed("cannot wait for qemu-img").because(e);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            if status.success() {
                return Ok(());
            }
            let mut words = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut stderr, &mut words);
            }
            let words: Vec<&str> = words.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
            return Err(Error::failed(format!("qemu-img fails ({status}): {}", words.join("; "))).remedy(
                "the words are qemu-img's: room on the filesystem and rights on the image are what it needs",
            ));
        }
        if interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::failed("interrupted: nothing was imported"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
