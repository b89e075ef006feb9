//! Disks of a VM that is captured: frozen for as long as they are read, given back afterwards.
//!
//! In the pause of the capture each writable image gets an external snapshot: from then on the VM writes to an overlay
//! beside it, and the image stays as it was. When it has been read, the overlay is committed into it and removed.
//! Until then the overlay holds what the guest has written since: nothing removes it that has not seen it committed, or
//! seen that nothing was written to it.
//!
//! If the VM ends on the way, its overlay is committed without it, but never one that QEMU has committed already: the
//! image may be newer. So the overlay gets another name while both are the same and QEMU holds the guest's I/O back:
//! between the job's `pending` and its `job-finalize`. A job that cannot come to its end is cancelled, so that it does
//! not hold the guest's I/O back for ever.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::images;
use super::open_files::{FileId, OpenFiles};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::LiveDisk;
use crate::error::{Error, Result};

/// How long the commit of one overlay may make no progress.
const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

/// How long a job may take to end once it is cancelled.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);

/// What the names of overlays have after the image's.
const MARK: &str = ".stencil-";

/// The image beneath an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Where this host sees it.
    pub place: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Size that the guest sees.
    pub size: u64,
    /// The file itself: QEMU opens images again by their paths, when it may write to them no more or again.
    pub id: FileId,
}

/// A disk that writes to an overlay while its image is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The block node of the image.
    pub node: String,
    /// The block node of the overlay.
    pub overlay_node: String,
    /// The overlay, in QEMU's eyes.
    pub overlay: PathBuf,
    /// The overlay, in the eyes of this host.
    pub place: PathBuf,
    /// The image.
    pub image: Image,
}

impl Frozen {
    /// The overlay's name once all of it is in the image.
    fn committed(&self) -> PathBuf {
        let mut name = self.place.clone().into_os_string();
        name.push("-committed");
        name.into()
    }

    /// The job that commits the overlay.
    fn job(&self) -> String {
        format!("commit-{}", self.overlay_node)
    }

    /// What a snapshot of that disk will be.
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

/// Disks of the VM that an earlier capture has frozen, and nobody has brought back.
///
/// # Errors
/// QEMU's words.
pub fn left_over(qmp: &mut Qmp, place: &dyn Fn(&Path) -> PathBuf) -> Result<Vec<Frozen>> {
    let disks = LiveDisk::all(&qmp.run("query-block", json!({}))?);
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

/// The file of an overlay. QEMU names the image beneath it along with it, where that is not as the overlay says.
fn file_of(name: &Path) -> PathBuf {
    let whole = name.to_str().and_then(|name| name.strip_prefix("json:"));
    let whole: Option<Value> = whole.and_then(|text| serde_json::from_str(text).ok());
    let file = whole.as_ref().and_then(|whole| whole.pointer("/file/filename")).and_then(Value::as_str);
    file.map_or_else(|| name.to_owned(), PathBuf::from)
}

/// Lets all of them write to overlays, or none. The VM stands still.
///
/// # Errors
/// QEMU's words. [`settle`] clears up: it may have done so and its answer was lost.
pub fn freeze(qmp: &mut Qmp, disks: &[Frozen]) -> Result<()> {
    let action = |disk: &Frozen| {
        json!({"type": "blockdev-snapshot-sync", "data": {
            "node-name": disk.node, "snapshot-node-name": disk.overlay_node,
            "snapshot-file": disk.overlay, "format": "qcow2", "mode": "existing",
        }})
    };
    let actions: Vec<Value> = disks.iter().map(action).collect();
    qmp.run("transaction", json!({"actions": actions})).map_err(|error| {
        error.context("the VM's disks cannot be frozen").remedy(
            "QEMU writes to an overlay beside each image for as long as that is read: it must be able to open it",
        )
    })?;
    // QEMU has opened the overlays, and its images again, by their paths.
    let open = OpenFiles::of(qmp.peer_pid()?)?;
    for disk in disks {
        open.must_have(&disk.image.place, disk.image.id)?;
        open.must_have(&disk.place, FileId::at(&disk.place)?)?;
    }
    Ok(())
}

/// Brings every disk back to its own image, and removes the overlays. What was never frozen is left alone. `interrupt`
/// ends the wait: the jobs go on.
///
/// # Errors
/// When an overlay cannot be committed: it is kept, and the message says what to do with it.
pub fn settle(qmp: &mut Qmp, disks: &[Frozen], interrupt: Option<&AtomicBool>) -> Result<()> {
    all_of(disks.iter().map(|disk| settle_one(qmp, disk, interrupt)))
}

/// Tries every one, and tells all that failed.
fn all_of(outcomes: impl Iterator<Item = Result<()>>) -> Result<()> {
    outcomes.filter_map(Result::err).reduce(Error::and).map_or(Ok(()), Err)
}

fn settle_one(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<()> {
    let file = disk.place.display();
    match bring_back(qmp, disk, interrupt) {
        Ok(true) => Ok(()),
        Ok(false) => settle_alone(qmp, disk).map_err(|error| {
            error.context(format!("the VM has no more disk that writes to the overlay {file}")).remedy(format!(
                "do not remove that file: it holds what the guest has written. Its image has that after \
                 `qemu-img commit {file}`, when no QEMU has the image open"
            ))
        }),
        Err(error) => Err(error
            .context(format!("the VM still writes to the overlay {file} of node {}", disk.node))
            .remedy(format!(
                "do not remove that file: it holds what the guest has written. A helper tries again for half a minute; \
                 then the next `stencil capture` of this VM brings it back before it begins, or, when QEMU has ended, \
                 `qemu-img commit {file}`"
            ))),
    }
}

/// QEMU commits the overlay; false when it has none.
fn bring_back(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<bool> {
    let job = disk.job();
    let mut known = job_of(qmp, &job)?;
    if known.as_ref().is_some_and(|job| job.get("error").is_some()) {
        // An attempt of before, that failed.
        qmp.run("job-dismiss", json!({"id": job}))?;
        known = None;
    }
    if known.is_none() {
        if !has_node(qmp, &disk.overlay_node)? {
            return Ok(false);
        }
        // QEMU opens the image by its path to write to it.
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
        return Err(Error::failed("QEMU has committed the overlay and still uses it"));
    }
    remove(&disk.place)?;
    remove(&disk.committed())?;
    Ok(true)
}

/// For an overlay that QEMU does not have: it was never frozen, or its device was taken out.
fn settle_alone(qmp: &mut Qmp, disk: &Frozen) -> Result<()> {
    // An image that QEMU has open is not ours to write to.
    if disk.place.exists() && has_node(qmp, &disk.node)? && images::is_written(&disk.place)? {
        return Err(Error::failed(format!("QEMU has its image open as node {}", disk.node)));
    }
    commit_alone(disk)
}

/// Commits what was written to an overlay that nobody has open, and removes it.
fn commit_alone(disk: &Frozen) -> Result<()> {
    remove(&disk.committed())?;
    if !disk.place.exists() {
        return Ok(());
    }
    if images::is_written(&disk.place)? {
        disk.image.id.must_be_at(&disk.image.place)?;
        images::commit(&disk.place)?;
    }
    remove(&disk.place)
}

fn remove(overlay: &Path) -> Result<()> {
    match fs::remove_file(overlay) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot remove the overlay, which is committed", overlay, e))
        }
        _ => Ok(()),
    }
}

/// The VM's block nodes.
///
/// # Errors
/// QEMU's words.
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

/// Ends a job that does not come to its end: the VM writes to the overlay as before.
fn cancel(qmp: &mut Qmp, disk: &Frozen) {
    let id = disk.job();
    let mut end = || -> Result<()> {
        // Before the guest writes again.
        if job_of(qmp, &id)?.is_some_and(|job| status_of(&job) == "pending") {
            let _ = fs::rename(disk.committed(), &disk.place);
        }
        let until = Instant::now() + CANCEL_PATIENCE;
        while let Some(job) = job_of(qmp, &id)?.filter(|_| Instant::now() < until) {
            if status_of(&job) == "concluded" {
                qmp.run("job-dismiss", json!({"id": id}))?;
            } else {
                // Refused where it ends already.
                let _ = qmp.run("job-cancel", json!({"id": id}));
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // Only what QEMU says it still writes to is an overlay again: of a VM that has died the image may be newer.
        if has_node(qmp, &disk.overlay_node)? {
            let _ = fs::rename(disk.committed(), &disk.place);
        }
        Ok(())
    };
    if let Err(error) = end() {
        log::debug!("{error}");
    }
}

/// Follows the job to its end: when it has caught up with the guest, the VM writes to its own image again.
fn wait_committed(qmp: &mut Qmp, disk: &Frozen, interrupt: Option<&AtomicBool>) -> Result<()> {
    let id = disk.job();
    let (mut seen, mut since) = (None, Instant::now());
    let (mut completed, mut finalized) = (false, false);
    loop {
        let Some(job) = job_of(qmp, &id)? else {
            return Err(Error::failed("the job that commits it has gone without a word"));
        };
        match status_of(&job) {
            "concluded" => {
                let outcome = job.get("error").and_then(Value::as_str).map(str::to_owned);
                qmp.run("job-dismiss", json!({"id": id}))?;
                return match outcome {
                    Some(why) => Err(Error::failed(format!("it cannot be committed: {why}"))),
                    None => Ok(()),
                };
            }
            "ready" if !completed => {
                qmp.run("job-complete", json!({"id": id}))?;
                completed = true;
            }
            "pending" if !finalized => {
                match fs::rename(&disk.place, disk.committed()) {
                    // A helper may find it done.
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
            return Err(Error::failed("interrupted while it is committed: a helper goes on with that"));
        }
        let progress = job.get("current-progress").and_then(Value::as_u64);
        if progress != seen {
            (seen, since) = (progress, Instant::now());
        }
        if since.elapsed() > COMMIT_PATIENCE {
            return Err(Error::try_again("the job that commits it does not go on"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The same when QEMU is gone: what the guest has written goes into its image.
///
/// # Errors
/// When qemu-img cannot do it: the overlay is kept, and the message names it.
pub fn settle_without_vm(disks: &[Frozen]) -> Result<()> {
    all_of(disks.iter().map(|disk| {
        // With the process its view of the host is gone, where that was not ours.
        let outcome = match disk.place.parent().is_some_and(Path::is_dir) {
            true => commit_alone(disk),
            false => Err(Error::failed(format!("its overlay {} is out of reach", disk.overlay.display()))),
        };
        outcome.map_err(|error| {
            error.context("the VM ended while its disk was read").remedy(format!(
                "do not start the VM from its image yet: `qemu-img commit {}`, where that file is, brings in what the \
                 guest wrote last",
                disk.overlay.display()
            ))
        })
    }))
}
