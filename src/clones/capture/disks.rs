//! Disks of a VM that is captured: frozen for as long as they are read, given back afterwards.
//!
//! In the pause of the capture each writable image gets an external snapshot: from then on the VM writes to an overlay
//! beside it, and the image stays as it was. When it has been read, the overlay is committed into it and removed.
//! Until then the overlay holds what the guest has written since: nothing removes it that has not seen it committed.
//!
//! If the VM ends on the way, its overlay is committed without it, but never one that QEMU has committed already: the
//! image may be newer. So the overlay gets another name while both are the same and QEMU holds the guest's I/O back:
//! between the job's `pending` and its `job-finalize`.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clones::qmp::Qmp;
use crate::clones::recipe::{LiveDisk, PlannedDisk};
use crate::error::{Error, Result};
use crate::sys::process::{inherit, own_session};

/// How long the commit of one overlay may make no progress.
const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

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
    /// The image: where QEMU sees it, where this host does, its format and its size.
    image: (PathBuf, PathBuf, String, u64),
}

impl Frozen {
    /// The overlay's name once all of it is in the image.
    fn committed(&self) -> PathBuf {
        let mut name = self.place.clone().into_os_string();
        name.push("-committed");
        name.into()
    }
}

impl Frozen {
    /// What a snapshot of that disk will be.
    pub fn plan(disk: &LiveDisk, number: usize, unique: &str, place: &dyn Fn(&Path) -> PathBuf) -> Frozen {
        let mut name = disk.image.path.clone().into_os_string();
        name.push(format!(".stencil-{unique}-{number}"));
        let overlay = PathBuf::from(name);
        Frozen {
            node: disk.node.clone(),
            overlay_node: format!("stencil-{unique}-{number}"),
            place: place(&overlay),
            overlay,
            image: (
                disk.image.path.clone(),
                place(&disk.image.path),
                disk.image.format.clone(),
                disk.image.size,
            ),
        }
    }

    /// Makes the empty overlay, for whoever may write to the image. `hold` goes with qemu-img: whoever clears up after
    /// this process waits until that is gone and makes no more file.
    ///
    /// # Errors
    /// When there can be no file beside the image.
    pub fn make(&self, hold: Option<OwnedFd>) -> Result<()> {
        let (path, place, format, size) = &self.image;
        let mut command = qemu_img();
        command.args(["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b"]).arg(path).arg(&self.place);
        if let Some(hold) = hold {
            inherit(&mut command, hold);
        }
        run(command.arg(size.to_string()), None)?;
        let failed = |e| Error::io("cannot give the overlay to the image's owner", &self.place, e);
        let owner = fs::metadata(place).map_err(failed)?;
        std::os::unix::fs::chown(&self.place, Some(owner.uid()), Some(owner.gid())).map_err(failed)?;
        fs::set_permissions(&self.place, owner.permissions()).map_err(failed)
    }
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
    qmp.run("transaction", json!({"actions": actions})).map(drop).map_err(|error| {
        error.context("the VM's disks cannot be frozen").remedy(
            "QEMU writes to an overlay beside each image for as long as that is read: it must be able to open it",
        )
    })
}

/// Brings every disk back to its own image, and removes the overlays. What was never frozen is left alone.
///
/// # Errors
/// When an overlay cannot be committed: it is kept, and the message says what to do with it.
pub fn settle(qmp: &mut Qmp, disks: &[Frozen]) -> Result<()> {
    let mut failed = None;
    for disk in disks {
        if let Err(error) = settle_one(qmp, disk) {
            failed.get_or_insert(error.context(format!(
                "the VM still writes to the overlay {} of node {}",
                disk.overlay.display(),
                disk.node
            )));
        }
    }
    failed.map_or(Ok(()), |error| {
        Err(error.remedy(
            "do not remove that file: it holds what the guest has written. QMP block-commit of the overlay's node \
             brings it back while the VM runs, `qemu-img commit` of the file afterwards",
        ))
    })
}

fn has_node(qmp: &mut Qmp, name: &str) -> Result<bool> {
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}))?;
    let is_it = |node: &Value| node.get("node-name").and_then(Value::as_str) == Some(name);
    Ok(nodes.as_array().is_some_and(|all| all.iter().any(is_it)))
}

fn settle_one(qmp: &mut Qmp, disk: &Frozen) -> Result<()> {
    let job = format!("commit-{}", disk.overlay_node);
    if has_node(qmp, &disk.overlay_node)? {
        if job_of(qmp, &job)?.is_none() {
            qmp.run(
                "block-commit",
                json!({"job-id": job, "device": disk.overlay_node, "base-node": disk.node,
                       "auto-finalize": false, "auto-dismiss": false}),
            )?;
        }
        if let Err(error) = wait_committed(qmp, &job, disk) {
            // Only what QEMU says it still writes to is an overlay again: of a VM that has died the image may be newer.
            if matches!(has_node(qmp, &disk.overlay_node), Ok(true)) {
                let _ = fs::rename(disk.committed(), &disk.place);
            }
            return Err(error);
        }
        if has_node(qmp, &disk.overlay_node)? {
            return Err(Error::failed("QEMU has committed the overlay and still uses it"));
        }
    }
    if let Some(over) = job_of(qmp, &job)? {
        // One that came to its end and was told nobody.
        log::debug!("{over}");
        qmp.run("job-dismiss", json!({"id": job}))?;
    }
    for path in [&disk.place, &disk.committed()] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the overlay, which is committed", path, e));
            }
            _ => {}
        }
    }
    Ok(())
}

fn job_of(qmp: &mut Qmp, id: &str) -> Result<Option<Value>> {
    let jobs = qmp.run("query-jobs", json!({}))?;
    let is_it = |job: &&Value| job.get("id").and_then(Value::as_str) == Some(id);
    Ok(jobs.as_array().and_then(|all| all.iter().find(is_it)).cloned())
}

/// Follows the job to its end: when it has caught up with the guest, the VM writes to its own image again.
fn wait_committed(qmp: &mut Qmp, id: &str, disk: &Frozen) -> Result<()> {
    let (mut seen, mut since) = (None, Instant::now());
    let (mut completed, mut finalized) = (false, false);
    loop {
        let Some(job) = job_of(qmp, id)? else {
            return Err(Error::failed("the job that commits it has gone without a word"));
        };
        match job.get("status").and_then(Value::as_str).unwrap_or_default() {
            "concluded" => {
                qmp.run("job-dismiss", json!({"id": id}))?;
                return match job.get("error").and_then(Value::as_str) {
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
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io("cannot rename the overlay", &disk.place, e));
                    }
                    _ => {}
                }
                qmp.run("job-finalize", json!({"id": id}))?;
                finalized = true;
            }
            _ => {}
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
    let mut failed = None;
    for disk in disks {
        // With the process its view of the host is gone, where that was not ours.
        if !disk.place.parent().is_some_and(Path::is_dir) {
            let why = format!(
                "the VM ended while its disk was read, and its overlay {} is out of reach",
                disk.overlay.display()
            );
            failed.get_or_insert(Error::failed(why).remedy(
                "where that file is: `qemu-img commit` of it brings in what the guest wrote last, before the VM is started again",
            ));
            continue;
        }
        let _ = fs::remove_file(disk.committed());
    }
    for disk in disks.iter().filter(|disk| disk.place.exists()) {
        let mut command = qemu_img();
        let outcome =
            run(command.args(["commit", "-q", "-f", "qcow2"]).arg(&disk.place), None).and_then(|()| {
                fs::remove_file(&disk.place)
                    .map_err(|e| Error::io("cannot remove the overlay", &disk.place, e))
            });
        if let Err(error) = outcome {
            failed.get_or_insert(error.context("the VM ended while its disk was read").at(&disk.place).remedy(
                "do not start the VM from its image yet: `qemu-img commit` of that file brings in what the guest wrote last",
            ));
        }
    }
    failed.map_or(Ok(()), Err)
}

/// The bytes of a disk as the guest saw them, without its chain; or the image as it is. The image stands still.
///
/// # Errors
/// When it cannot be read, or the folder has no room for a copy.
pub fn contents(
    disk: &PlannedDisk,
    place: &dyn Fn(&Path) -> PathBuf,
    folder: &Path,
    interrupt: &AtomicBool,
) -> Result<File> {
    if disk.as_it_is() {
        let path = place(&disk.live.image.path);
        return File::open(&path).map_err(|e| Error::io("cannot open the VM's disk", &path, e));
    }
    let copy =
        tempfile::tempfile_in(folder).map_err(|e| Error::io("cannot make a temporary file", folder, e))?;
    copy.set_len(disk.live.image.size).map_err(|e| Error::io("cannot make a temporary file", folder, e))?;
    let mut command = qemu_img();
    let source = format!("json:{}", disk.live.image.to_json(place));
    // It reads and writes through descriptors of this process: nothing has a name that could be left behind.
    let target = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&copy));
    command.args(["convert", "-q", "-U", "-n", "--target-is-zero", "-O", "raw", &source, &target]);
    run(&mut command, Some(interrupt))
        .map_err(|e| e.context(format!("the disk {} cannot be read", disk.name)))?;
    Ok(copy)
}

/// Reached by no key of a terminal, with no descriptor but those that it is to inherit.
fn qemu_img() -> Command {
    let mut command = Command::new("qemu-img");
    own_session(&mut command);
    command
}

/// Runs qemu-img to its end.
fn run(command: &mut Command, interrupt: Option<&AtomicBool>) -> Result<()> {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| {
        Error::io("cannot start", "qemu-img", e)
            .remedy("install it (Debian: qemu-utils) and put it into PATH")
    })?;
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
