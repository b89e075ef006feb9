//! A running QEMU becomes a template, and runs on as before.
//!
//! RAM is in a file that QEMU shares, so it is read where it lies while the VM stands still; device state
//! comes through a pipe as a migration that leaves that RAM out. Where the file system can clone a file,
//! the VM stands still for the clone only, not for the import.

mod back;
mod busy;
mod check;
mod disks;
mod images;
mod lock;
mod open_files;
mod stand;
mod vm;
mod watchdog;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::migration::Settings;
use super::qmp::Qmp;
use super::recipe::PlannedDisk;
use crate::error::Result;
use crate::progress::Progress;
use crate::store::{FileKind, ImportFile, ImportRequest, Imported, Later, Source, Store, TagName};
use crate::sys::process::ProcessId;
use crate::units::Bytes;
use back::Before;
pub use check::{Check, Finding, check};
use disks::Frozen;
use lock::VmLock;
use stand::Stand;
use vm::{RamFile, Vm};
use watchdog::ResumeOnDeath;
pub use watchdog::{RESUME_ARGUMENT, resume_main};

/// What becomes of the VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// It runs if it ran.
    #[default]
    AsBefore,
    /// It stands still.
    Pause,
    /// It is ended.
    Quit,
}

/// What came of a capture.
#[derive(Debug, Serialize)]
pub struct Captured {
    /// The template.
    #[serde(flatten)]
    pub imported: Imported,
    /// How long the VM stood still, in seconds; `null` when it did before or does now.
    pub pause_seconds: Option<f64>,
    /// True when RAM was cloned within its file system, so that the VM ran on during the import.
    pub cloned: bool,
    /// Bytes of device state.
    pub state_bytes: Bytes,
    /// State of the VM afterwards, in QEMU's words; `quit` when it was ended.
    pub vm: String,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Captures the VM behind a QMP socket.
///
/// # Errors
/// When the VM is not one that clones can be made of (the message names everything that stands against it), another
/// capture has it, or something fails on the way: then the VM is as it was before, and the store as well. Where a part
/// of either is not, the message says so.
pub fn capture(
    store: &Store,
    socket: &Path,
    tag: &TagName,
    afterwards: Afterwards,
    interrupt: Arc<AtomicBool>,
    progress: &dyn Progress,
) -> Result<Captured> {
    let mut qmp = Qmp::open(socket)?;
    let lock = VmLock::take(qmp.peer_pid()?)?;
    qmp.greet()?;
    settle_left_over(&mut qmp, socket, &lock, &interrupt)?;
    let vm = Arc::new(Vm::look(&mut qmp)?);
    let run_on = afterwards == Afterwards::AsBefore && vm.was_running;
    let ram = vm.ram_files()?;
    let roms = vm.rom_files()?;
    let frozen = if run_on { frozen(&vm)? } else { vec![] };
    let stand = Stand::prepare(qmp, socket, &vm, frozen, lock, interrupt.clone())?;
    let stand = Arc::new(Mutex::new(stand));
    let work = Work { store, vm: &vm, ram: &ram, roms: &roms, stand: &stand, run_on, interrupt: &interrupt };
    let taken = work.take(tag, progress);

    let mut stand = held(&stand);
    let finished = stand.finish(!run_on && taken.is_ok());
    let (taken, pause) = match (taken, finished) {
        (Ok(taken), Ok(pause)) => (taken, pause),
        (Ok(taken), Err(error)) => {
            let digest = taken.imported.digest;
            return Err(
                error.context(format!("template {tag} was made ({digest}), but its VM is not as it was"))
            );
        }
        (Err(error), Err(other)) => return Err(error.and(other)),
        (Err(error), Ok(_)) => return Err(error),
    };
    let vm_now = match afterwards {
        Afterwards::Quit => stand.quit(),
        _ => stand.status(),
    };
    Ok(Captured {
        imported: taken.imported,
        pause_seconds: run_on.then_some(pause.as_secs_f64()),
        cloned: taken.cloned,
        state_bytes: taken.state_bytes,
        vm: vm_now.map_err(|e| e.context(format!("template {tag} was made; afterwards")))?,
        warnings: vm.plan.warnings.clone(),
    })
}

/// What was read of a VM.
struct Taken {
    imported: Imported,
    cloned: bool,
    state_bytes: Bytes,
}

/// What it takes to read a VM.
struct Work<'a> {
    store: &'a Store,
    vm: &'a Arc<Vm>,
    ram: &'a [RamFile],
    roms: &'a [(String, File)],
    stand: &'a Arc<Mutex<Stand>>,
    run_on: bool,
    interrupt: &'a Arc<AtomicBool>,
}

impl Work<'_> {
    /// The pause and the import.
    fn take(&self, tag: &TagName, progress: &dyn Progress) -> Result<Taken> {
        let Work { store, vm, ram, roms, stand, run_on, interrupt } = *self;
        let mut request = ImportRequest::new(Some(tag.clone()), vm.blob_files());
        request.interrupt = Some(interrupt.clone());
        request.recipe = Some(vm.recipe());
        held(stand).still(vm)?;
        let state = held(stand).device_state()?;
        let state_bytes = Bytes::new(state.metadata().map_or(0, |m| m.len()));
        request.files.push(ImportFile {
            name: "state".into(),
            kind: FileKind::Blob,
            source: Source::Path(by_descriptor(&state)),
        });
        let clones: Option<Vec<File>> =
            if run_on { ram.iter().map(|(_, _, file, dir)| clone_file(file, dir)).collect() } else { None };
        let sources = ram.iter().zip(0..).map(|((name, _, file, _), at)| {
            let file = clones.as_ref().and_then(|all| all.get(at)).unwrap_or(file);
            ImportFile { name: name.clone(), kind: FileKind::Ram, source: Source::Path(by_descriptor(file)) }
        });
        request.files.extend(sources);
        let rom = |(name, file): &(String, File)| ImportFile {
            name: name.clone(),
            kind: FileKind::Rom,
            source: Source::Path(by_descriptor(file)),
        };
        request.files.extend(roms.iter().map(rom));
        let disks = vm.plan.disks.iter().map(|disk| {
            let later = Disk { vm: vm.clone(), disk: disk.clone(), store: store.clone() };
            later.source(stand, run_on, interrupt)
        });
        request.files.extend(disks.collect::<Result<Vec<_>>>()?);
        if clones.is_some() {
            all_is_read(stand)?;
        }
        let until_read = UntilRead { inner: progress, stand, run_on, interrupt };
        let imported = store.import(request, &until_read);
        // An import that was stopped for that says no more than that it was.
        held(stand).undisturbed()?;
        Ok(Taken { imported: imported?, cloned: clones.is_some(), state_bytes })
    }
}

/// What must be of one moment has been read: the VM runs again.
///
/// # Errors
/// When it was not one moment.
fn all_is_read(stand: &Mutex<Stand>) -> Result<()> {
    let mut stand = held(stand);
    let one_moment = stand.is_read();
    stand.over(false)?;
    one_moment
}

/// Brings disks back that a capture has left frozen, with its helper. This one has a helper for that as well: QEMU must
/// not be left within the end of a commit.
fn settle_left_over(qmp: &mut Qmp, socket: &Path, lock: &VmLock, interrupt: &AtomicBool) -> Result<()> {
    let pid = qmp.peer_pid()?;
    let disks = disks::left_over(qmp, &|path| vm::path_of(pid, path))?;
    if disks.is_empty() {
        return Ok(());
    }
    for disk in &disks {
        log::warn!("{}: left by an earlier capture, is brought back first", disk.place.display());
    }
    let process = ProcessId::of(pid)?.ok_or_else(|| vm::no_vm_here(pid))?;
    // Whether the guest runs is not changed.
    let before = Before { ran: false, settings: Settings::of(qmp)?, disks };
    let helper = ResumeOnDeath::start(socket, process, lock.share()?, &before)?;
    before.settle(qmp, process, Some(interrupt))?;
    helper.dismiss();
    Ok(())
}

fn held<'a>(stand: &'a Mutex<Stand>) -> MutexGuard<'a, Stand> {
    stand.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The snapshots of all disks that the guest writes to.
fn frozen(vm: &Vm) -> Result<Vec<Frozen>> {
    let unique = format!("{}-{}", vm.pid, crate::clones::registry::random_id()?);
    let place = |path: &Path| vm.path_of(path);
    let writable = vm.plan.disks.iter().filter(|disk| !disk.live.read_only);
    let plan = |(disk, number): (&PlannedDisk, usize)| {
        let id = vm.images.id(&disk.live.image.path)?;
        Ok(Frozen::plan(&disk.live, id, number, &unique, &place))
    };
    writable.zip(0..).map(plan).collect()
}

/// A disk that is read when RAM has been: the VM does not stand still for it.
struct Disk {
    vm: Arc<Vm>,
    disk: PlannedDisk,
    store: Store,
}

impl Disk {
    fn source(
        self,
        stand: &Arc<Mutex<Stand>>,
        run_on: bool,
        interrupt: &Arc<AtomicBool>,
    ) -> Result<ImportFile> {
        let name = self.disk.file();
        let size = match self.disk.as_it_is() {
            true => {
                let path = &self.disk.live.image.path;
                let meta = self.vm.images.file(path)?.metadata();
                meta.map_err(|e| crate::error::Error::io("cannot read the VM's disk", path, e))?.len()
            }
            false => self.disk.live.image.size,
        };
        let (stand, interrupt) = (stand.clone(), interrupt.clone());
        let open = move || {
            if run_on {
                all_is_read(&stand)?;
            }
            images::contents(&self.disk, &self.vm.images, &self.store, &interrupt)
        };
        let source = Source::Later(Later { size, open: Arc::new(open) });
        Ok(ImportFile { name, kind: FileKind::Blob, source })
    }
}

/// A path by which this process opens the file again, whatever became of its name.
fn by_descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A copy that shares its blocks, where the file system can make one; else nothing.
fn clone_file(file: &File, dir: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let copy = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).ok()?;
    rustix::fs::ioctl_ficlone(&copy, file).ok()?;
    Some(File::from(copy))
}

/// Lets the VM run again as soon as an import has read all of its sources: what comes then, flushing to the disk and
/// the commit, need not make a guest wait. What was not one moment is not committed.
struct UntilRead<'a> {
    inner: &'a dyn Progress,
    stand: &'a Mutex<Stand>,
    run_on: bool,
    interrupt: &'a AtomicBool,
}

impl Progress for UntilRead<'_> {
    fn start(&self, phase: &str, total: Option<Bytes>) {
        self.inner.start(phase, total);
    }

    fn start_count(&self, phase: &str, total: u64) {
        self.inner.start_count(phase, total);
    }

    fn advance(&self, done: Bytes) {
        self.inner.advance(done);
    }

    fn finish(&self) {
        // What fails here is met again, and told, at the end.
        let mut stand = held(self.stand);
        if stand.is_read().is_err() {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        if self.run_on
            && let Err(error) = stand.over(false)
        {
            log::debug!("{error}");
        }
        self.inner.finish();
    }
}
