//! A running QEMU becomes a template, and runs on as before.
//!
//! RAM is in a file that QEMU shares, so it is read where it lies while the VM stands still; device state
//! comes through a pipe as a migration that leaves that RAM out. Where the file system can clone a file,
//! the VM stands still for the clone only, not for the import.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use serde_json::{Value, json};

use super::launch::ResumeOnDeath;
use super::qmp::Qmp;
use super::recipe::{Facts, Plan, Recipe, is_device_for_clones, plan};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::{FileKind, ImportFile, ImportRequest, Imported, Source, Store, TagName};
use crate::sys::procfs;
use crate::units::Bytes;

/// How long the device state may take; it is some hundred KiB.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

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
/// When the VM is not one that clones can be made of (the message names everything that stands against it), or
/// something fails on the way: then the VM is as it was before, and the store as well.
pub fn capture(
    store: &Store,
    socket: &Path,
    tag: &TagName,
    afterwards: Afterwards,
    interrupt: Arc<AtomicBool>,
    progress: &dyn Progress,
) -> Result<Captured> {
    let mut qmp = Qmp::connect(socket)?;
    let vm = Vm::look(&mut qmp)?;
    let ram = vm.ram_files()?;
    let mut request = ImportRequest::new(Some(tag.clone()), vm.blob_files());
    request.interrupt = Some(interrupt);
    request.recipe =
        Some(Recipe::qemu(vm.program.clone(), vm.version.clone(), vm.plan.argv.clone()).to_value());

    let mut stand = Stand::still(qmp, socket, vm.was_running)?;
    let state = stand.device_state()?;
    let state_bytes = Bytes::new(state.metadata().map_or(0, |m| m.len()));
    request.files.push(ImportFile {
        name: "state".into(),
        kind: FileKind::Blob,
        source: Source::Path(by_descriptor(&state)),
    });
    let run_on = afterwards == Afterwards::AsBefore && vm.was_running;
    let clones: Option<Vec<File>> =
        if run_on { ram.iter().map(|(_, _, file, dir)| clone_file(file, dir)).collect() } else { None };
    let sources = ram.iter().zip(0..).map(|((name, _, file, _), at)| {
        let file = clones.as_ref().and_then(|all| all.get(at)).unwrap_or(file);
        ImportFile { name: name.clone(), kind: FileKind::Ram, source: Source::Path(by_descriptor(file)) }
    });
    request.files.extend(sources);

    let (imported, pause) = if clones.is_some() {
        let pause = stand.over(false)?;
        (store.import(request, progress)?, Some(pause))
    } else if run_on {
        let until_read =
            UntilRead { inner: progress, stand: Mutex::new(&mut stand), pause: Mutex::default() };
        let imported = store.import(request, &until_read);
        let pause = until_read.pause.into_inner().unwrap_or_else(PoisonError::into_inner);
        (imported?, Some(pause.unwrap_or_else(|| stand.over(false))?))
    } else {
        let imported = store.import(request, progress)?;
        stand.over(true)?;
        (imported, None)
    };
    let vm_now = match afterwards {
        Afterwards::Quit => stand.quit()?,
        _ => stand.status()?,
    };
    Ok(Captured {
        imported,
        pause_seconds: pause.map(|p| p.as_secs_f64()),
        cloned: clones.is_some(),
        state_bytes,
        vm: vm_now,
        warnings: vm.plan.warnings,
    })
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

/// A VM that clones can be made of.
struct Vm {
    pid: u32,
    was_running: bool,
    plan: Plan,
    program: String,
    version: String,
}

/// A RAM file: its name in the template, its backend, the file, the folder that it lies in.
type RamFile = (String, String, File, PathBuf);

impl Vm {
    /// Finds out all about it, and changes nothing.
    fn look(qmp: &mut Qmp) -> Result<Vm> {
        let was_running = match qmp.status()?.as_str() {
            "running" => true,
            "paused" | "prelaunch" => false,
            "postmigrate" => {
                return Err(Error::usage(
                    "this VM stands still after a migration, and QEMU does not migrate it twice",
                )
                .remedy("let it run with QMP cont, then capture again"));
            }
            other => {
                return Err(Error::usage(format!(
                    "this VM is in state '{other}'; it must be running or paused"
                ))
                .remedy("wait until its state passes, or let it run with QMP cont, then capture again"));
            }
        };
        let pid = qmp.peer_pid()?;
        let gone = || {
            Error::failed(format!("process {pid}, which opened the QMP socket, is no QEMU of this host"))
                .remedy("run stencil on the host and in the pid namespace of the QEMU")
        };
        let words = procfs::cmdline(pid)?.ok_or_else(gone)?;
        let (first, argv) = words.split_first().ok_or_else(gone)?;
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(|e| gone().because(e))?;
        let program = if exe.exists() { exe.display().to_string() } else { first.clone() };
        let version = qmp.run("query-version", json!({}))?;
        let number = |key| version.pointer(&format!("/qemu/{key}")).and_then(Value::as_u64).unwrap_or(0);
        let version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        let kind = qmp.run("qom-get", json!({"path": "/machine", "property": "type"}))?;
        let machine_type = kind.as_str().and_then(|t| t.strip_suffix("-machine")).map(str::to_owned);
        let plan = plan(argv, &Facts { machine_type })?;
        check_live(qmp, &plan)?;
        Ok(Vm { pid, was_running, plan, program, version })
    }

    /// Opens the files that hold RAM, and makes sure that the VM really has them mapped.
    fn ram_files(&self) -> Result<Vec<RamFile>> {
        let maps = procfs::maps(self.pid, |_, _| true)?.unwrap_or_default();
        let open = |ram: &super::recipe::Ram| {
            let (file, dir) = self.memory_file(&maps, &ram.id, &ram.mem_path)?;
            Ok((ram.file.clone(), ram.id.clone(), file, dir))
        };
        let roms = self.plan.roms.iter().map(|rom| self.memory_file(&maps, &rom.id, &rom.mem_path));
        roms.collect::<Result<Vec<_>>>()?;
        self.plan.ram.iter().map(open).collect()
    }

    /// The file of a memory object, and the folder that it lies in.
    fn memory_file(&self, maps: &[procfs::MapLine], id: &str, mem_path: &str) -> Result<(File, PathBuf)> {
        let path = self.path_of(Path::new(mem_path));
        let file = File::open(&path).map_err(|e| Error::io("cannot open the VM's memory file", &path, e))?;
        let meta = file.metadata().map_err(|e| Error::io("cannot look at the VM's memory file", &path, e))?;
        // Some file systems (btrfs) show another device number in maps than in stat.
        let named = |m: &&procfs::MapLine| m.path.ends_with(mem_path.trim_start_matches('/'));
        let is_it = |m: &&procfs::MapLine| m.ino == meta.ino() && (m.dev == meta.dev() || named(m));
        if !meta.is_file() || !maps.iter().any(|m| is_it(&m) && !m.is_private()) {
            return Err(Error::usage(format!(
                "the VM does not share the memory of '{id}' through this file"
            ))
            .at(&path)
            .remedy("give mem-path= the path of a file, and do not replace it while the VM runs"));
        }
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        Ok((file, dir))
    }

    fn blob_files(&self) -> Vec<ImportFile> {
        let file = |blob: &super::recipe::Blob| ImportFile {
            name: blob.file.clone(),
            kind: FileKind::Blob,
            source: Source::Path(self.path_of(&blob.path)),
        };
        let rom = |rom: &super::recipe::Rom| ImportFile {
            name: rom.file.clone(),
            kind: FileKind::Rom,
            source: Source::Path(self.path_of(Path::new(&rom.mem_path))),
        };
        self.plan.blobs.iter().map(file).chain(self.plan.roms.iter().map(rom)).collect()
    }

    /// A path as that process sees it, whatever its root and working directory are.
    fn path_of(&self, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(rest) => Path::new(&format!("/proc/{}/root", self.pid)).join(rest),
            Err(_) => Path::new(&format!("/proc/{}/cwd", self.pid)).join(path),
        }
    }
}

/// What was plugged in while the VM ran does not stand in its command line.
fn check_live(qmp: &mut Qmp, plan: &Plan) -> Result<()> {
    let mut against = vec![];
    let mut devices = 0;
    for place in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let list = qmp.run("qom-list", json!({"path": place}))?;
        for item in list.as_array().into_iter().flatten() {
            let kind = item.get("type").and_then(Value::as_str).unwrap_or_default();
            let Some(driver) = kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>')) else {
                continue;
            };
            devices += 1;
            if !is_device_for_clones(driver) {
                let name = item.get("name").and_then(Value::as_str).unwrap_or_default();
                against.push(format!("device {driver} ({name})"));
            }
        }
    }
    if devices != plan.devices && against.is_empty() {
        against.push(format!(
            "devices that were plugged in or out ({} on the command line, {devices} in the VM)",
            plan.devices
        ));
    }
    for disk in qmp.run("query-block", json!({}))?.as_array().into_iter().flatten() {
        if disk.get("inserted").is_some() {
            let name = |key| disk.get(key).and_then(Value::as_str).filter(|n| !n.is_empty());
            against.push(format!("disk {}", name("device").or(name("qdev")).unwrap_or("without a name")));
        }
    }
    for memory in qmp.run("query-memdev", json!({}))?.as_array().into_iter().flatten() {
        let id = memory.get("id").and_then(Value::as_str).unwrap_or("without id");
        if !plan.ram.iter().any(|ram| ram.id == id) && !plan.roms.iter().any(|rom| rom.id == id) {
            against.push(format!("memory '{id}'"));
        }
    }
    if against.is_empty() {
        return Ok(());
    }
    Err(Error::usage(format!("clones cannot have: {}", against.join("; ")))
        .remedy("start the VM without it, then capture again; guests without disk and network can be cloned"))
}

/// Lets the VM run again as soon as an import has read all of its sources: what comes then, flushing to the disk and
/// the commit, need not make a guest wait.
struct UntilRead<'a> {
    inner: &'a dyn Progress,
    stand: Mutex<&'a mut Stand>,
    pause: Mutex<Option<Result<Duration>>>,
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
        let mut stand = self.stand.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        if pause.is_none() {
            *pause = Some(stand.over(false));
        }
        drop((stand, pause));
        self.inner.finish();
    }
}

/// A VM that stands still. However this ends, it is let run again if it ran.
struct Stand {
    qmp: Qmp,
    since: Instant,
    was_running: bool,
    ignored_shared: Option<bool>,
    is_over: bool,
    helper: Option<ResumeOnDeath>,
}

impl Stand {
    fn still(mut qmp: Qmp, socket: &Path, was_running: bool) -> Result<Stand> {
        let helper = if was_running { Some(ResumeOnDeath::start(socket)?) } else { None };
        let ignored_shared = Some(qmp.ignore_shared(true)?);
        let mut stand =
            Stand { qmp, since: Instant::now(), was_running, ignored_shared, is_over: false, helper };
        if was_running {
            stand.since = Instant::now();
            stand.qmp.run("stop", json!({}))?;
        }
        Ok(stand)
    }

    /// Device state, without the RAM that lies in shared files.
    fn device_state(&mut self) -> Result<File> {
        let failed = |e: rustix::io::Errno| Error::failed("cannot make a pipe").because(e.into());
        let (heard, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        let arguments = json!({"fdname": "stencil-state"});
        self.qmp.run_passing("getfd", arguments.clone(), Some(say.as_fd()))?;
        drop(say);
        if let Err(error) = self.qmp.run("migrate", json!({"uri": "fd:stencil-state"})) {
            let _ = self.qmp.run("closefd", arguments);
            return Err(error);
        }
        let deadline = Instant::now() + STATE_PATIENCE;
        let file = tempfile::tempfile().map_err(|e| {
            Error::io("cannot make a temporary file for device state", std::env::temp_dir(), e)
        })?;
        let received = receive(&heard, &file, deadline);
        if received.is_err() {
            let _ = self.qmp.run("migrate_cancel", json!({}));
        }
        received?;
        self.qmp.wait_migrated(deadline)?;
        Ok(file)
    }

    /// The end of the pause; gives its length.
    fn over(&mut self, stay: bool) -> Result<Duration> {
        if let Some(before) = self.ignored_shared.take() {
            self.qmp.ignore_shared(before)?;
        }
        if self.was_running && !stay {
            self.qmp.run("cont", json!({}))?;
        }
        self.is_over = true;
        if let Some(helper) = self.helper.take() {
            helper.dismiss();
        }
        Ok(self.since.elapsed())
    }

    fn status(&mut self) -> Result<String> {
        self.qmp.status()
    }

    fn quit(&mut self) -> Result<String> {
        self.qmp.run("quit", json!({}))?;
        Ok("quit".to_owned())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        if !self.is_over
            && let Err(error) = self.over(false)
        {
            log::error!("the VM could not be let run again: {error}");
        }
    }
}

/// Everything that comes through the pipe, until its end.
fn receive(pipe: &OwnedFd, file: &File, deadline: Instant) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut file = file;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::try_again("QEMU does not bring its device state to an end"));
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(Error::failed("cannot wait for device state").because(e.into())),
        }
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => file
                .write_all(buffer.get(..got).unwrap_or_default())
                .map_err(|e| Error::io("cannot keep device state", std::env::temp_dir(), e))?,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failed("cannot read device state").because(e.into())),
        }
    }
}
