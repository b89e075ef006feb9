//! Captures a running QEMU or Firecracker as a template; the VM continues afterwards.
//!
//! QEMU: RAM is in files mapped with `share=on`, so the capture reads the files while the VM is paused. Device state is
//! received through a pipe, from a migration without shared RAM. If the file system can clone files (reflink), the VM
//! is resumed after a clone of the RAM files; otherwise after the import has read them.

mod busy;
mod capture_watchdog;
mod check;
mod disks;
mod firecracker;
mod images;
mod lock;
mod open_files;
mod outcome;
mod pause;
mod restore;
mod vm;
mod vm_process;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};

use super::migration::Settings;
use super::qmp::Qmp;
use super::recipe::PlannedDisk;
use crate::error::Result;
use crate::progress::Progress;
use crate::store::{FileKind, ImportFile, ImportRequest, Imported, Later, Source, Store, TagName};
use crate::sys::process::ProcessId;
use crate::units::Bytes;
use capture_watchdog::{Before, ResumeOnDeath};
pub use capture_watchdog::{RESUME_ARGUMENT, resume_main};
pub use check::check;
use disks::Frozen;
use lock::VmLock;
use open_files::by_descriptor;
pub use outcome::{AfterCapture, Captured, Check, Finding};
use pause::PausedVm;
use restore::SavedState;
use vm::{RamFile, Vm};

/// Captures the VM behind a QMP socket of QEMU or an API socket of Firecracker.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) with all obstacles if the VM is unsupported,
/// [`Code::InUse`](crate::error::Code::InUse) if another capture has locked the VM, and the first error of a failed
/// step otherwise. VM and store are then in their previous state; if a part could not be restored, the message names
/// it.
pub fn capture(
    store: &Store,
    socket: &Path,
    tag: &TagName,
    afterwards: AfterCapture,
    interrupt: Arc<AtomicBool>,
    progress: &dyn Progress,
) -> Result<Captured> {
    let mut qmp = Qmp::open(socket)?;
    let pid = qmp.peer_pid()?;
    if vm_process::is_firecracker(pid) {
        drop(qmp);
        return firecracker::capture(store, (socket, pid), tag, afterwards, interrupt, progress);
    }
    let lock = VmLock::take(pid)?;
    qmp.greet()?;
    restore_left_over(&mut qmp, socket, &lock, &interrupt)?;
    let vm = Arc::new(Vm::inspect(&mut qmp)?);
    let resumes = afterwards == AfterCapture::AsBefore && vm.was_running;
    let ram = vm.ram_files()?;
    let roms = vm.rom_files()?;
    let frozen = if resumes { frozen(&vm)? } else { vec![] };
    let paused = PausedVm::prepare(qmp, socket, &vm, frozen, lock, interrupt.clone())?;
    let paused = Arc::new(Mutex::new(paused));
    let reader = SnapshotReader {
        store,
        vm: &vm,
        ram: &ram,
        roms: &roms,
        paused: &paused,
        resumes,
        interrupt: &interrupt,
    };
    let taken = reader.take(tag, progress);

    let mut paused = held(&paused);
    let finished = paused.finish(!resumes && taken.is_ok());
    let (taken, pause) = match (taken, finished) {
        (Ok(taken), Ok(pause)) => (taken, pause),
        (Ok(taken), Err(error)) => {
            let digest = taken.imported.digest;
            return Err(
                error.context(format!("created template {tag} ({digest}), but could not restore its VM"))
            );
        }
        (Err(error), Err(other)) => return Err(error.and(other)),
        (Err(error), Ok(_)) => return Err(error),
    };
    let vm_now = match afterwards {
        AfterCapture::Quit => paused.quit(),
        _ => paused.status(),
    };
    Ok(Captured {
        imported: taken.imported,
        pause_seconds: resumes.then_some(pause.as_secs_f64()),
        cloned: taken.cloned,
        state_bytes: taken.state_bytes,
        vm: vm_now.map_err(|e| e.context(format!("created template {tag}, then the VM failed")))?,
        warnings: vm.plan.warnings.clone(),
    })
}

/// The result of reading a VM.
struct Taken {
    imported: Imported,
    cloned: bool,
    state_bytes: Bytes,
}

/// The inputs for reading a VM.
struct SnapshotReader<'a> {
    store: &'a Store,
    vm: &'a Arc<Vm>,
    ram: &'a [RamFile],
    roms: &'a [(String, File)],
    paused: &'a Arc<Mutex<PausedVm>>,
    resumes: bool,
    interrupt: &'a Arc<AtomicBool>,
}

impl SnapshotReader<'_> {
    /// Pauses the VM and imports its files.
    fn take(&self, tag: &TagName, progress: &dyn Progress) -> Result<Taken> {
        let SnapshotReader { store, vm, ram, roms, paused, resumes, interrupt } = *self;
        let mut request = ImportRequest::new(Some(tag.clone()), vm.blob_files());
        request.interrupt = Some(interrupt.clone());
        request.recipe = Some(vm.recipe());
        held(paused).pause(vm)?;
        let state = held(paused).device_state()?;
        let state_bytes = Bytes::new(state.metadata().map_or(0, |m| m.len()));
        request.files.push(ImportFile {
            name: "state".into(),
            kind: FileKind::Blob,
            source: Source::Path(by_descriptor(&state)),
        });
        let clones: Option<Vec<File>> =
            if resumes { ram.iter().map(|(_, _, file, dir)| clone_file(file, dir)).collect() } else { None };
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
            later.source(paused, resumes, interrupt)
        });
        request.files.extend(disks.collect::<Result<Vec<_>>>()?);
        if clones.is_some() {
            end_snapshot(paused)?;
        }
        let until_read = UntilRead { inner: progress, paused, resumes, interrupt };
        let imported = store.import(request, &until_read);
        // A disturbance is checked first: the error of an import that was interrupted by a disturbance does not name
        // the reason.
        held(paused).undisturbed()?;
        Ok(Taken { imported: imported?, cloned: clones.is_some(), state_bytes })
    }
}

/// Ends the snapshot and resumes the VM; everything that must be from one point in time has been read.
///
/// # Errors
/// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if another client resumed or reset the VM during the
/// snapshot, or an error of QEMU.
fn end_snapshot(paused: &Mutex<PausedVm>) -> Result<()> {
    let mut paused = held(paused);
    let consistent = paused.end_snapshot();
    paused.resume(false)?;
    consistent
}

/// Restores disks that an earlier capture and its helper have left frozen. This step has a helper too, because QEMU
/// must not be left in the middle of finishing a commit.
fn restore_left_over(qmp: &mut Qmp, socket: &Path, lock: &VmLock, interrupt: &AtomicBool) -> Result<()> {
    let pid = qmp.peer_pid()?;
    let disks = disks::left_over(qmp, &|path| vm_process::path_of(pid, path))?;
    if disks.is_empty() {
        return Ok(());
    }
    for disk in &disks {
        log::warn!("overlay {} was left by an earlier capture; committing it first", disk.place.display());
    }
    let process = ProcessId::of(pid)?.ok_or_else(|| vm_process::no_vm_here(pid))?;
    // `ran: false` leaves the run state of the guest unchanged.
    let before = SavedState { ran: false, settings: Settings::of(qmp)?, disks };
    let helper = ResumeOnDeath::start(socket, process, vec![lock.share()?], Before::Qemu(before.clone()))?;
    before.restore_disks(qmp, process, Some(interrupt))?;
    helper.dismiss();
    Ok(())
}

fn held<'a>(paused: &'a Mutex<PausedVm>) -> MutexGuard<'a, PausedVm> {
    paused.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Plans the snapshots of all writable disks.
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

/// A disk that the import reads after RAM, while the VM runs.
struct Disk {
    vm: Arc<Vm>,
    disk: PlannedDisk,
    store: Store,
}

impl Disk {
    fn source(
        self,
        paused: &Arc<Mutex<PausedVm>>,
        resumes: bool,
        interrupt: &Arc<AtomicBool>,
    ) -> Result<ImportFile> {
        let name = self.disk.file();
        let size = match self.disk.is_verbatim() {
            true => {
                let path = &self.disk.live.image.path;
                let meta = self.vm.images.file(path)?.metadata();
                meta.map_err(|e| crate::error::Error::io("cannot read the VM's disk", path, e))?.len()
            }
            false => self.disk.live.image.size,
        };
        let (paused, interrupt) = (paused.clone(), interrupt.clone());
        let open = move || {
            if resumes {
                end_snapshot(&paused)?;
            }
            images::contents(&self.disk, &self.vm.images, &self.store, &interrupt)
        };
        let source = Source::Later(Later { size, open: Arc::new(open) });
        Ok(ImportFile { name, kind: FileKind::Blob, source })
    }
}

/// Clones a file with shared blocks (`FICLONE`); returns `None` if the file system cannot.
fn clone_file(file: &File, dir: &Path) -> Option<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let copy = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).ok()?;
    rustix::fs::ioctl_ficlone(&copy, file).ok()?;
    Some(File::from(copy))
}

/// Resumes the VM as soon as the import has read all sources, before it flushes and commits. Interrupts the import if
/// the snapshot is not from one point in time, so that no template is committed.
struct UntilRead<'a> {
    inner: &'a dyn Progress,
    paused: &'a Mutex<PausedVm>,
    resumes: bool,
    interrupt: &'a AtomicBool,
}

impl Progress for UntilRead<'_> {
    fn start(&self, phase: &str, total: Option<Bytes>) {
        self.inner.start(phase, total);
    }

    fn start_count(&self, phase: &str, unit: &'static str, total: u64) {
        self.inner.start_count(phase, unit, total);
    }

    fn advance(&self, done: Bytes) {
        self.inner.advance(done);
    }

    fn finish(&self) {
        // Errors that are ignored here are returned by `undisturbed` and `finish` at the end.
        let mut paused = held(self.paused);
        if paused.end_snapshot().is_err() {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        if self.resumes
            && let Err(error) = paused.resume(false)
        {
            log::debug!("{error}");
        }
        self.inner.finish();
    }
}
