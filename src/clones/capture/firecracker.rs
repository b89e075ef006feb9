//! Captures a running Firecracker. Firecracker writes a full snapshot into temporary files, the guest resumes, and the
//! import reads the files.
//!
//! Firecracker executes one request at a time, and refuses a snapshot while the guest runs: a snapshot is always from
//! one point in time, whatever other clients request.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::capture_watchdog::{Before, ResumeOnDeath};
use super::lock::VmLock;
use super::open_files::by_descriptor;
use super::outcome::{AfterCapture, Captured, Check, Finding};
use super::restore::SavedMicrovm;
use super::vm_process::{Credentials, can_open_own_files, file_size_limit, no_vm_here};
use crate::clones::vmm_api::Api;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::{FileKind, ImportFile, ImportFormat, ImportRequest, Source, Store, TagName, random_name};
use crate::sys::files::directory::Directory;
use crate::sys::probe;
use crate::sys::process::{ProcessId, cgroup, paused};
use crate::units::Bytes;

/// Timeout of a snapshot without memory.
const MIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Lowest rate at which Firecracker is expected to write memory to a file, in bytes per second.
const MIN_WRITE_RATE: u64 = 8 << 20;

/// Timeout for the exit of Firecracker after SIGTERM, and after SIGKILL.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest state file that is expected: Firecracker itself rejects a larger one.
const MAX_STATE: Bytes = Bytes::new(10 << 20);

/// Names of the files in the template.
const MEMORY: &str = "memory";
const STATE: &str = "state";

/// A Firecracker VM.
struct Microvm {
    ran: bool,
    memory: Bytes,
    findings: Vec<Finding>,
}

impl Microvm {
    /// Inspects the VM, which is to run after the capture if `may_run` is set.
    fn inspect(api: &mut Api, process: ProcessId, may_run: bool) -> Result<Microvm> {
        if let Some(pause) = paused::of(process.pid) {
            let text = format!("Firecracker (process {}) {pause}", process.pid);
            return Err(Error::try_again(text).hint(pause.remedy(process.pid)));
        }
        let state = api.state()?;
        let config = api.get("/vm/config")?;
        let size =
            config.pointer("/machine-config/mem_size_mib").and_then(Value::as_u64).ok_or_else(|| {
                Error::failed(
                    "Firecracker does not report the size of its memory (GET /vm/config, mem_size_mib)",
                )
                .hint("use Firecracker 1.0 or later")
            })?;
        let (ran, memory) = (state == "running", Bytes::new(size.saturating_mul(1 << 20)));
        let mut findings = findings(&state, &config, ran && may_run);
        if let Some(limit) = file_size_limit(process.pid).filter(|limit| *limit < memory) {
            findings.push(Finding {
                about: "ram",
                blocks: true,
                what: format!("Firecracker may write files of at most {limit}, and the memory has {memory}"),
                remedy: "start Firecracker without this limit (ulimit -f, --resource-limit fsize=)"
                    .to_owned(),
            });
        }
        Ok(Microvm { ran, memory, findings })
    }
}

/// Returns the obstacles to a capture, and notes. `resumes`: the guest is to run after the capture.
fn findings(state: &str, config: &Value, resumes: bool) -> Vec<Finding> {
    let mut found = vec![];
    let mut add = |about, blocks, what: String, remedy: &str| {
        found.push(Finding { about, blocks, what, remedy: remedy.to_owned() });
    };
    let machine = &config["machine-config"];
    if !matches!(state, "running" | "paused") {
        let what = format!("the VM is in state '{state}', expected running or paused");
        add("state", true, what, "start the guest first (PUT /actions InstanceStart)");
    }
    if machine["huge_pages"] == "2M" {
        let what = "the RAM of this VM is in huge pages of 2 MiB, and Firecracker cannot load such a snapshot \
                    from a file";
        add("ram", true, what.to_owned(), "start the VM without huge_pages");
    }
    if config["memory-hotplug"].is_object() {
        let what = "this VM has hotpluggable memory, which has holes in a snapshot while it is not plugged";
        add("ram", true, what.to_owned(), "start the VM without memory-hotplug");
    }
    if machine["track_dirty_pages"] == true {
        let what = "the next diff snapshot of this VM contains the pages that changed since this capture";
        add("ram", false, what.to_owned(), "import that diff with --base and the name of this template");
    }
    if config["vsock"].is_object() {
        let what = "Firecracker resets the vsock connections of the guest at each snapshot";
        add("device", false, what.to_owned(), "reconnect the programs that use vsock");
    }
    for drive in ["drives", "pmem"].into_iter().filter_map(|key| config[key].as_array()).flatten() {
        let text = |keys: &[&str]| keys.iter().find_map(|key| drive[*key].as_str()).unwrap_or("?").to_owned();
        let disk = format!("disk '{}' ({})", text(&["drive_id", "id"]), text(&["path_on_host", "socket"]));
        let read_only = ["is_read_only", "read_only"].iter().any(|key| drive[*key] == true);
        if drive["socket"].is_string() {
            let what = format!("{disk} is a vhost-user device, which a snapshot does not contain");
            add("device", true, what, "use a disk that is a file");
        } else if read_only {
            let what = format!("{disk} is not part of the template");
            add("disk", false, what, "keep the disk at this path for the clones");
        } else if resumes {
            let what = format!(
                "{disk} is writable and not part of the template: after the capture, the VM would continue to write \
                 to the disk"
            );
            let remedy = "capture the VM with --pause, copy the disk, then resume the VM (PATCH /vm); or make the \
                          disk read-only";
            add("disk", true, what, remedy);
        } else {
            let what = format!("{disk} is writable and not part of the template");
            let remedy = "copy the disk before a VM writes to it, and give each clone a copy at this path";
            add("disk", false, what, remedy);
        }
    }
    found
}

/// Checks the VM of a Firecracker behind its API socket.
///
/// # Errors
/// Returns an error if Firecracker does not reply, and [`Code::InUse`](crate::error::Code::InUse) if a capture has
/// locked the VM.
pub(super) fn check(socket: &Path, pid: u32) -> Result<Check> {
    let process = ProcessId::of(pid)?.ok_or_else(|| no_vm_here(pid))?;
    let _lock = VmLock::take(pid)?;
    let Microvm { findings, .. } = Microvm::inspect(&mut Api::of_process(socket, process)?, process, true)?;
    let can_be_captured = !findings.iter().any(|finding| finding.blocks);
    Ok(Check { pid, can_be_captured, findings, directory: PathBuf::new(), command: vec![] })
}

/// Captures the VM of a Firecracker behind its API socket.
///
/// # Errors
/// Same as [`capture`](super::capture).
pub(super) fn capture(
    store: &Store,
    (socket, pid): (&Path, u32),
    tag: &TagName,
    afterwards: AfterCapture,
    interrupt: Arc<AtomicBool>,
    progress: &dyn Progress,
) -> Result<Captured> {
    let process = ProcessId::of(pid)?.ok_or_else(|| no_vm_here(pid))?;
    let lock = VmLock::take(pid)?;
    let mut api = Api::of_process(socket, process)?;
    let Microvm { ran, memory, findings, .. } =
        Microvm::inspect(&mut api, process, afterwards == AfterCapture::AsBefore)?;
    let (obstacles, notes): (Vec<Finding>, Vec<Finding>) = findings.into_iter().partition(|f| f.blocks);
    if !obstacles.is_empty() {
        let join = |text: fn(&Finding) -> &str| obstacles.iter().map(text).collect::<Vec<_>>().join("; ");
        return Err(Error::usage(format!("cannot capture the VM: {}", join(|f| &f.what)))
            .at(socket)
            .hint(join(|f| &f.remedy)));
    }
    let warnings = notes.into_iter().map(|note| format!("{}: {}", note.what, note.remedy)).collect();
    let resumes = afterwards == AfterCapture::AsBefore && ran;
    let mut paused = PausedMicrovm::prepare(api, socket, process, ran, lock)?;
    if interrupt.load(Ordering::Relaxed) {
        return Err(Error::failed("interrupted; nothing was captured"));
    }
    let [memory, state] = paused.snapshot(store, memory)?;
    let pause = if resumes { Some(paused.resume()?) } else { None };

    let state_bytes = Bytes::new(state.metadata().map_or(0, |meta| meta.len()));
    let source = |name: &str, kind, file| {
        let source = Source::Path(by_descriptor(file));
        ImportFile { name: name.to_owned(), kind, source }
    };
    let sources = vec![source(MEMORY, FileKind::Ram, &memory), source(STATE, FileKind::Blob, &state)];
    let mut request = ImportRequest::new(Some(tag.clone()), sources);
    (request.format, request.interrupt) = (ImportFormat::Firecracker, Some(interrupt));
    let imported = store.import(request, progress)?;
    let vm_now = match afterwards {
        AfterCapture::Quit => paused.quit(),
        AfterCapture::AsBefore | AfterCapture::Pause => paused.leave(),
    };
    Ok(Captured {
        imported,
        pause_seconds: pause.map(|pause| pause.as_secs_f64()),
        cloned: false,
        state_bytes,
        vm: vm_now.map_err(|e| e.context(format!("created template {tag}, then the VM failed")))?,
        warnings,
    })
}

/// The directory of the temporary files, for a Firecracker that cannot open files without a name.
struct FilesDirectory {
    directory: Directory,
    /// The user and group of Firecracker.
    owner: (u32, u32),
}

impl FilesDirectory {
    /// Opens the working directory of Firecracker. In a jail it is the root directory of the jail.
    ///
    /// The directory must belong to the user of Firecracker, who can create files there anyway: the user chooses the
    /// working directory, and must not make root create files in a directory of the system.
    fn of(process: ProcessId) -> Result<FilesDirectory> {
        let path = PathBuf::from(format!("/proc/{}/cwd", process.pid));
        let failed = |e| Error::io("cannot use the working directory of Firecracker", &path, e);
        let directory = Directory::open(&path)
            .map_err(|e| failed(e).hint("run the command as root or as the user of Firecracker"))?;
        let found = rustix::fs::fstat(directory.as_fd()).map_err(|e| failed(e.into()))?;
        let credentials = Credentials::of(process.pid).ok_or_else(|| no_vm_here(process.pid))?;
        let ([_, uid, ..], [_, gid, ..]) = (credentials.uids, credentials.gids);
        if found.st_uid != uid || found.st_mode & 0o300 != 0o300 {
            return Err(Error::usage(format!(
                "the working directory of Firecracker (process {}) is not a writable directory of its user {uid}",
                process.pid
            ))
            .at(fs::read_link(&path).unwrap_or(path))
            .hint(format!(
                "make the directory writable and owned by user {uid} if only this VM uses it (chown, chmod u+wx), or start \
                 Firecracker in such a directory: a capture puts its temporary files there"
            )));
        }
        Ok(FilesDirectory { directory, owner: (uid, gid) })
    }
}

/// A Firecracker VM during its capture. Dropping this value restores the VM.
struct PausedMicrovm {
    api: Api,
    socket: PathBuf,
    vm: ProcessId,
    /// True if the guest was running.
    ran: bool,
    before: SavedMicrovm,
    directory: Option<FilesDirectory>,
    /// `None` after the VM was restored or released.
    helper: Option<ResumeOnDeath>,
    /// Start of the pause.
    since: Instant,
    _lock: VmLock,
}

impl PausedMicrovm {
    /// Starts the helper, which must know of the files before they are made, and of the pause before it begins.
    fn prepare(api: Api, socket: &Path, vm: ProcessId, ran: bool, lock: VmLock) -> Result<PausedMicrovm> {
        let mut before = SavedMicrovm { paused: false, files: vec![], directory: None };
        let mut inherited = vec![lock.share()?];
        let directory = if can_open_own_files(vm.pid) { None } else { Some(FilesDirectory::of(vm)?) };
        if let Some(FilesDirectory { directory, .. }) = &directory {
            let unique = random_name()?;
            before.files = [MEMORY, STATE].map(|kind| format!("stencil-{unique}.{kind}")).to_vec();
            let copy = directory.as_fd().try_clone_to_owned();
            let copy = copy.map_err(|e| Error::failed("cannot duplicate a file descriptor").because(e))?;
            before.directory = Some(copy.as_raw_fd());
            inherited.push(copy);
        }
        let helper = ResumeOnDeath::start(socket, vm, inherited, Before::Firecracker(before.clone()))?;
        let (socket, helper, since) = (socket.to_owned(), Some(helper), Instant::now());
        Ok(PausedMicrovm { api, socket, vm, ran, before, directory, helper, since, _lock: lock })
    }

    /// Pauses the guest, and makes Firecracker write a snapshot. Returns the files with memory and state.
    ///
    /// The files have no names and are in the store's directory. For a Firecracker that cannot open them there (in a
    /// jail, or of another user), they have names in Firecracker's working directory until the snapshot is complete.
    fn snapshot(&mut self, store: &Store, memory: Bytes) -> Result<[File; 2]> {
        self.expect_space(store, memory)?;
        let files = [self.create_file(store, 0)?, self.create_file(store, 1)?];
        let paths = [0, 1].map(|at| match self.before.files.get(at) {
            Some(name) => name.clone(),
            None => format!("/proc/{}/fd/{}", std::process::id(), files[at].as_raw_fd()),
        });
        if self.ran {
            if self.api.state()? != "running" {
                return Err(Error::try_again("another client has paused the VM")
                    .at(&self.socket)
                    .hint("capture the VM again while no other client controls the VM"));
            }
            self.before.paused = true;
            if let Some(helper) = &mut self.helper {
                helper.tell_before(Before::Firecracker(self.before.clone()))?;
            }
            self.since = Instant::now();
            self.api.set_state("Paused")?;
        }
        let [memory_path, state_path] = paths;
        let body = json!({
            "snapshot_type": "Full",
            "mem_file_path": memory_path,
            "snapshot_path": state_path,
        });
        let timeout = MIN_TIMEOUT + Duration::from_secs(memory.get() / MIN_WRITE_RATE);
        self.api.run("PUT /snapshot/create", &body, Instant::now() + timeout).map_err(|error| match error
            .hint_text()
        {
            Some(_) => error,
            None => error.hint("see the log of Firecracker"),
        })?;
        self.remove_files();
        Ok(files)
    }

    /// Checks that the snapshot fits, so that neither the guest waits for a failure nor the file system gets full.
    fn expect_space(&self, store: &Store, memory: Bytes) -> Result<()> {
        let path = match &self.directory {
            Some(FilesDirectory { directory, .. }) => {
                PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()))
            }
            None => store.dir().to_owned(),
        };
        let needed = memory + MAX_STATE;
        let found = probe::file_system(&path)?;
        let shown = fs::read_link(&path).unwrap_or(path);
        if found.free < needed {
            return Err(Error::failed(format!("the snapshot needs {needed}, and {} are free", found.free))
                .at(shown)
                .hint("free space in this file system"));
        }
        // Without this check, the kernel could kill Firecracker for its memory limit.
        match cgroup::memory_left(self.vm.pid).filter(|left| found.is_memory() && *left < needed) {
            Some(left) => Err(Error::failed(format!(
                "the snapshot needs {needed} of memory, and the memory limit of Firecracker's control group leaves {left}"
            ))
            .at(shown)
            .hint(match self.directory {
                Some(_) => "raise the limit, or start Firecracker in a directory on a disk",
                None => "raise the limit, or use a store on a disk",
            })),
            None => Ok(()),
        }
    }

    fn create_file(&self, store: &Store, at: usize) -> Result<File> {
        let (path, created) = match &self.directory {
            None => (store.dir(), tempfile::tempfile_in(store.dir())),
            Some(FilesDirectory { directory, owner: (uid, gid) }) => {
                let file = directory.create(&self.before.files[at], 0o600);
                let owned = |file: File| fchown(&file, Some(*uid), Some(*gid)).map(|()| file);
                (directory.path(), file.and_then(owned))
            }
        };
        created.map_err(|e| {
            Error::io("cannot create a temporary file for the snapshot", path, e)
                .hint("make this directory writable")
        })
    }

    fn remove_files(&self) {
        if let Some(FilesDirectory { directory, .. }) = &self.directory {
            self.before.remove_files_in(directory);
        }
    }

    /// Resumes the guest; nothing of the VM is left to restore then. Returns the length of the pause.
    fn resume(&mut self) -> Result<Duration> {
        self.before.resume(&self.socket, self.vm).map_err(|e| e.context("cannot resume the VM"))?;
        let pause = self.since.elapsed();
        self.dismiss();
        Ok(pause)
    }

    /// Makes the helper leave the VM as it is.
    fn dismiss(&mut self) {
        if let Some(helper) = self.helper.take() {
            helper.dismiss();
        }
    }

    /// Leaves the VM as it is. Returns its state.
    fn leave(&mut self) -> Result<String> {
        self.dismiss();
        Api::of_process(&self.socket, self.vm)?.state()
    }

    /// Ends Firecracker. The guest never runs again, even if Firecracker does not exit: its disks must not change.
    fn quit(&mut self) -> Result<String> {
        self.dismiss();
        for signal in [Signal::TERM, Signal::KILL] {
            self.vm.signal(signal).map_err(|error| {
                error.hint(
                    "the VM is paused: end Firecracker as root or as its user, or resume the VM (PATCH /vm)",
                )
            })?;
            if self.vm.wait_for_exit(EXIT_TIMEOUT)? {
                return Ok("quit".to_owned());
            }
        }
        let text = format!("Firecracker (process {}) has not exited after SIGKILL", self.vm.pid);
        Err(Error::try_again(text)
            .hint("see the kernel's log: a process that cannot exit waits for a device"))
    }
}

impl Drop for PausedMicrovm {
    fn drop(&mut self) {
        let Some(helper) = self.helper.take() else { return };
        match self.before.resume(&self.socket, self.vm) {
            Ok(()) => {
                self.remove_files();
                helper.dismiss();
            }
            // The helper retries when its standard input ends, and removes the files.
            Err(error) => log::error!("cannot resume the VM: {error}"),
        }
    }
}
