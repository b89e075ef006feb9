//! Disks of a captured VM: frozen while they are read, restored afterwards.
//!
//! While the VM is paused, each writable image gets an external snapshot: from then on the VM writes to an overlay
//! beside the image, and the image does not change. When the image has been read, the overlay is committed into the
//! image and removed. Until then the overlay holds the guest's writes since the snapshot: an overlay is removed only
//! after a successful commit, or if it has no data.
//!
//! If QEMU exits before the commit, qemu-img commits the overlay, but never an overlay that QEMU has already committed,
//! because the image may be newer. Therefore the overlay is renamed while overlay and image are equal and QEMU holds
//! back the guest's I/O: between the job's state `pending` and the command `job-finalize`. A job that does not complete
//! is cancelled, so that it does not hold back the guest's I/O forever.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::images::{self, Image};
use super::open_files::{FileId, OpenFiles};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::LiveDisk;
use crate::error::{Error, Result};

/// Timeout for a commit job without progress.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Timeout for the end of a cancelled job.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// Separates the image's name from the unique suffix in the name of an overlay.
const MARK: &str = ".stencil-";

/// A disk that writes to an overlay while its image is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The block node of the image.
    pub node: String,
    /// The block node of the overlay.
    pub overlay_node: String,
    /// Path of the overlay, as QEMU sees it.
    pub overlay: PathBuf,
    /// Path of the overlay on the host.
    pub place: PathBuf,
    /// The image.
    pub image: Image,
}

impl Frozen {
    /// Returns the name of the overlay after its commit.
    fn committed(&self) -> PathBuf {
        let mut name = self.place.clone().into_os_string();
        name.push("-committed");
        name.into()
    }

    /// Returns the id of the job that commits the overlay.
    fn job(&self) -> String {
        format!("commit-{}", self.overlay_node)
    }

    /// Plans the snapshot of a disk. `id` identifies the image file, `place` maps a path of QEMU to one of the host.
    pub fn plan(
        disk: &LiveDisk,
        id: FileId,
        number: usize,
        unique: &str,
        place: &dyn Fn(&Path) -> PathBuf,
    ) -> Frozen {
        let mut name = disk.image.path.clone().into_os_string();
        name.push(format!("{MARK}{unique}-{number}"));
        let overlay = PathBuf::from(name);
        Frozen {
            node: disk.node.clone(),
            overlay_node: format!("stencil-{unique}-{number}"),
            place: place(&overlay),
            overlay,
            image: Image {
                place: place(&disk.image.path),
                format: disk.image.format.clone(),
                size: disk.image.size,
                id,
            },
        }
    }
}

/// Finds disks of the VM that an earlier capture has frozen and not restored.
///
/// # Errors
/// Same as [`Qmp::run`]; also returns an error if a path of an image leads to another file than QEMU has open.
pub fn left_over(qmp: &mut Qmp, place: &dyn Fn(&Path) -> PathBuf) -> Result<Vec<Frozen>> {
    let disks = LiveDisk::from_query_block(&qmp.run("query-block", json!({}))?);
    let mut found = vec![];
    for disk in disks.iter().filter(|disk| disk.node.starts_with("stencil-")) {
        let (overlay, Some(image)) = (file_of(&disk.image.path), &disk.image.backing) else { continue };
        if !overlay.to_string_lossy().contains(MARK) {
            continue;
        }
        let nodes = block_nodes(qmp)?;
        let is_it = |node: &&Value| {
            let text = |key| node.get(key).and_then(Value::as_str);
            text("drv") == Some(&image.format) && text("file").map(Path::new) == Some(&image.path)
        };
        let node = nodes.iter().find(is_it).and_then(|n| n.get("node-name")).and_then(Value::as_str);
        let Some(node) = node else { continue };
        let id = FileId::at(&place(&image.path))?;
        OpenFiles::of(qmp.peer_pid()?)?.must_have(&image.path, id)?;
        found.push(Frozen {
            node: node.to_owned(),
            overlay_node: disk.node.clone(),
            place: place(&overlay),
            overlay,
            image: Image { place: place(&image.path), format: image.format.clone(), size: image.size, id },
        });
    }
    Ok(found)
}

/// Returns the file in a name of QEMU, which is a `json:` description if the backing image differs from that in the
/// overlay's header.
fn file_of(name: &Path) -> PathBuf {
    let json = name.to_str().and_then(|name| name.strip_prefix("json:"));
    let json: Option<Value> = json.and_then(|text| serde_json::from_str(text).ok());
    let file = json.as_ref().and_then(|json| json.pointer("/file/filename")).and_then(Value::as_str);
    file.map_or_else(|| name.to_owned(), PathBuf::from)
}

/// Switches all disks to their overlays, or none. The VM must be paused.
///
/// # Errors
/// Same as [`Qmp::run`]. The caller must then call [`restore`], because QEMU may have switched the disks before the
/// session failed.
pub fn freeze(qmp: &mut Qmp, disks: &[Frozen]) -> Result<()> {
    let action = |disk: &Frozen| {
        json!({"type": "blockdev-snapshot-sync", "data": {
            "node-name": disk.node, "snapshot-node-name": disk.overlay_node,
            "snapshot-file": disk.overlay, "format": "qcow2", "mode": "existing",
        }})
    };
    let actions: Vec<Value> = disks.iter().map(action).collect();
    qmp.run("transaction", json!({"actions": actions})).map_err(|error| {
        error
            .context("cannot freeze the VM's disks")
            .hint("give QEMU access to the overlays that a capture creates beside the images")
    })?;
    // QEMU has opened the overlays, and reopened the images, by path.
    let open = OpenFiles::of(qmp.peer_pid()?)?;
    for disk in disks {
        open.must_have(&disk.image.place, disk.image.id)?;
        open.must_have(&disk.place, FileId::at(&disk.place)?)?;
    }
    Ok(())
}

/// Restores all disks: commits each overlay into its image and removes the overlay. Leaves disks that are not frozen
/// alone. `interrupt` ends the wait, but not the jobs.
///
/// # Errors
/// Returns an error if an overlay cannot be committed. The overlay is kept, and the hint tells how to commit it.
pub fn restore(qmp: &mut Qmp, disks: &[Frozen], interrupt: Option<&AtomicBool>) -> Result<()> {
    all_of(disks.iter().map(|disk| restore_one(qmp, disk, interrupt)))
}

/// Runs all steps, and returns their errors as one.
fn all_of(outcomes: impl Iterator<Item = Result<()>>) -> Result<()> {
    outcomes.filter_map(Result::err).reduce(Error::and).map_or(Ok(()), Err)
}

fn restore_one(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<()> {
    let file = disk.place.display();
    match commit_in_vm(qmp, disk, interrupt) {
        Ok(true) => Ok(()),
        Ok(false) => restore_detached(qmp, disk).map_err(|error| {
            error.context(format!("no disk of the VM uses the overlay {file} any more")).hint(format!(
                "do not remove the overlay, which holds writes of the guest; run 'qemu-img commit {file}' when no QEMU \
                 has the image open"
            ))
        }),
        Err(error) => Err(error
            .context(format!("the VM still writes to the overlay {file} of node {}", disk.node))
            .hint(format!(
                "do not remove the overlay, which holds writes of the guest; a helper retries the commit for 30 s, and \
                 the next 'stencil capture' of this VM commits it; if QEMU has exited, run 'qemu-img commit {file}'"
            ))),
    }
}

/// Commits the overlay through QEMU; returns false if QEMU does not have the overlay.
fn commit_in_vm(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<bool> {
    let job = disk.job();
    let mut existing = job_of(qmp, &job)?;
    if existing.as_ref().is_some_and(|job| job.get("error").is_some()) {
        // An earlier attempt failed.
        qmp.run("job-dismiss", json!({"id": job}))?;
        existing = None;
    }
    if existing.is_none() {
        if !has_node(qmp, &disk.overlay_node)? {
            return Ok(false);
        }
        // QEMU reopens the image by path for writing.
        disk.image.id.must_be_at(&disk.image.place)?;
        qmp.run(
            "block-commit",
            json!({"job-id": job, "device": disk.overlay_node, "base-node": disk.node,
                   "auto-finalize": false, "auto-dismiss": false}),
        )?;
    }
    let committed = wait_committed(qmp, disk, interrupt);
    if committed.is_err() && !interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
        cancel(qmp, disk);
    }
    committed?;
    if has_node(qmp, &disk.overlay_node)? {
        return Err(Error::failed("QEMU committed the overlay but still uses it"));
    }
    remove(&disk.place)?;
    remove(&disk.committed())?;
    Ok(true)
}

/// Restores a disk whose overlay QEMU does not have: the disk was never frozen, or its device was unplugged.
fn restore_detached(qmp: &mut Qmp, disk: &Frozen) -> Result<()> {
    // qemu-img must not write to an image that QEMU has open.
    if disk.place.exists() && has_node(qmp, &disk.node)? && images::has_data(&disk.place)? {
        return Err(Error::failed(format!("QEMU has the image open as node {}", disk.node)));
    }
    commit_offline(disk)
}

/// Commits the data of an overlay that no process has open, and removes the overlay.
fn commit_offline(disk: &Frozen) -> Result<()> {
    remove(&disk.committed())?;
    if !disk.place.exists() {
        return Ok(());
    }
    if images::has_data(&disk.place)? {
        disk.image.id.must_be_at(&disk.image.place)?;
        images::commit(&disk.place)?;
    }
    remove(&disk.place)
}

fn remove(overlay: &Path) -> Result<()> {
    match fs::remove_file(overlay) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot remove the committed overlay", overlay, e))
        }
        _ => Ok(()),
    }
}

/// Returns the block nodes of the VM.
///
/// # Errors
/// Same as [`Qmp::run`].
pub fn block_nodes(qmp: &mut Qmp) -> Result<Vec<Value>> {
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}))?;
    Ok(nodes.as_array().cloned().unwrap_or_default())
}

fn has_node(qmp: &mut Qmp, name: &str) -> Result<bool> {
    let is_it = |node: &Value| node.get("node-name").and_then(Value::as_str) == Some(name);
    Ok(block_nodes(qmp)?.iter().any(is_it))
}

fn job_of(qmp: &mut Qmp, id: &str) -> Result<Option<Value>> {
    let jobs = qmp.run("query-jobs", json!({}))?;
    let is_it = |job: &&Value| job.get("id").and_then(Value::as_str) == Some(id);
    Ok(jobs.as_array().and_then(|all| all.iter().find(is_it)).cloned())
}

fn status_of(job: &Value) -> &str {
    job.get("status").and_then(Value::as_str).unwrap_or_default()
}

/// Cancels a job that does not complete; the VM continues to write to the overlay.
fn cancel(qmp: &mut Qmp, disk: &Frozen) {
    let id = disk.job();
    let mut cancel = || -> Result<()> {
        // Renames the overlay back before the guest can write again.
        if job_of(qmp, &id)?.is_some_and(|job| status_of(&job) == "pending") {
            let _ = fs::rename(disk.committed(), &disk.place);
        }
        let until = Instant::now() + CANCEL_TIMEOUT;
        while let Some(job) = job_of(qmp, &id)?.filter(|_| Instant::now() < until) {
            if status_of(&job) == "concluded" {
                qmp.run("job-dismiss", json!({"id": id}))?;
            } else {
                // QEMU refuses to cancel a job that is already ending.
                let _ = qmp.run("job-cancel", json!({"id": id}));
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // Renames the overlay back only if QEMU reports that the VM still uses it: if QEMU has died, the image may be
        // newer.
        if has_node(qmp, &disk.overlay_node)? {
            let _ = fs::rename(disk.committed(), &disk.place);
        }
        Ok(())
    };
    if let Err(error) = cancel() {
        log::debug!("{error}");
    }
}

/// Drives the job to its end: when the commit has caught up with the guest's writes, QEMU switches the disk back to the
/// image.
fn wait_committed(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<()> {
    let id = disk.job();
    let (mut seen, mut since) = (None, Instant::now());
    let (mut completed, mut finalized) = (false, false);
    loop {
        let Some(job) = job_of(qmp, &id)? else {
            return Err(Error::failed("the commit job disappeared"));
        };
        match status_of(&job) {
            "concluded" => {
                let outcome = job.get("error").and_then(Value::as_str).map(str::to_owned);
                qmp.run("job-dismiss", json!({"id": id}))?;
                return match outcome {
                    Some(reason) => Err(Error::failed(format!("the commit failed: {reason}"))),
                    None => Ok(()),
                };
            }
            "ready" if !completed => {
                qmp.run("job-complete", json!({"id": id}))?;
                completed = true;
            }
            "pending" if !finalized => {
                match fs::rename(&disk.place, disk.committed()) {
                    // An interrupted capture may have renamed the overlay before its helper takes over.
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound || !disk.committed().exists() => {
                        return Err(Error::io("cannot rename the overlay", &disk.place, e));
                    }
                    _ => {}
                }
                qmp.run("job-finalize", json!({"id": id}))?;
                finalized = true;
            }
            _ => {}
        }
        if !finalized && interrupt.is_some_and(|i| i.load(Ordering::Relaxed)) {
            return Err(Error::failed("interrupted during the commit, which a helper continues"));
        }
        let progress = job.get("current-progress").and_then(Value::as_u64);
        if progress != seen {
            (seen, since) = (progress, Instant::now());
        }
        if since.elapsed() > COMMIT_TIMEOUT {
            return Err(Error::try_again(format!(
                "timed out after {} s without progress of the commit",
                COMMIT_TIMEOUT.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Restores the disks of a VM whose QEMU has exited: qemu-img commits the overlays.
///
/// # Errors
/// Returns an error if qemu-img fails. The overlay is kept, and the message names it.
pub fn restore_without_vm(disks: &[Frozen]) -> Result<()> {
    all_of(disks.iter().map(|disk| {
        // If QEMU had another root directory, paths below /proc/PID/root end with the process.
        let outcome = match disk.place.parent().is_some_and(Path::is_dir) {
            true => commit_offline(disk),
            false => Err(Error::failed(format!("cannot reach the overlay {}", disk.overlay.display()))),
        };
        outcome.map_err(|error| {
            error.context("QEMU exited while a disk was captured").hint(format!(
                "before you start the VM again, commit the guest's last writes: run `qemu-img commit {}` where that path \
                 exists",
                disk.overlay.display()
            ))
        })
    }))
}
