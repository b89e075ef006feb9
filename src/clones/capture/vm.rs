//! Inspects a VM before its capture, without changing the VM.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::busy;
use super::disks::block_nodes;
use super::open_files::HeldFiles;
use super::vm_process::{no_vm_here, path_of};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{Blob, Facts, LiveDisk, Plan, Ram, Recipe, Rom, is_device_for_clones, plan};
use crate::error::{Error, Result};
use crate::store::{FileKind, ImportFile, Source};
use crate::sys::process::ProcessId;
use crate::sys::process::{procfs, times};

/// A VM that can be captured.
pub(super) struct Vm {
    pub pid: u32,
    pub process: ProcessId,
    pub was_running: bool,
    pub plan: Plan,
    /// The images of the disks, with their backing chains.
    pub images: HeldFiles,
    /// Addresses of the memory objects in QEMU's address space, by id, as far as QEMU reports them.
    addresses: BTreeMap<String, u64>,
    program: String,
    version: String,
}

/// A RAM file: its name in the template, the id of its backend, the open file, and the file's directory.
pub(super) type RamFile = (String, String, File, PathBuf);

/// A VM, as QMP and /proc describe it.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub pid: u32,
    pub process: ProcessId,
    /// Path of the program.
    pub program: String,
    version: String,
    /// The command line, without the program name.
    pub argv: Vec<String>,
    /// Facts that the command line does not contain.
    pub facts: Facts,
}

impl Live {
    /// Collects the facts about a VM.
    pub fn inspect(qmp: &mut Qmp) -> Result<Live> {
        let pid = qmp.peer_pid()?;
        let gone = || no_vm_here(pid);
        let words = procfs::cmdline(pid)?.ok_or_else(gone)?;
        let (first, argv) = words.split_first().ok_or_else(gone)?;
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(|e| gone().because(e))?;
        let program = if exe.exists() { exe.display().to_string() } else { first.clone() };
        let version = qmp.run("query-version", json!({}))?;
        let number = |key| version.pointer(&format!("/qemu/{key}")).and_then(Value::as_u64).unwrap_or(0);
        let version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        let kind = qmp.run("qom-get", json!({"path": "/machine", "property": "type"}))?;
        let machine_type = kind.as_str().and_then(|t| t.strip_suffix("-machine")).map(str::to_owned);
        let process = ProcessId::of(pid)?.ok_or_else(gone)?;
        let mut disks = LiveDisk::from_query_block(&qmp.run("query-block", json!({}))?);
        for disk in disks.iter_mut().filter(|disk| disk.problem.is_none()) {
            disk.problem = disk.image.chain().find_map(|image| host_problem(pid, &image.path));
        }
        let facts = Facts { machine_type, disks };
        Ok(Live { pid, process, program, version, argv: argv.to_vec(), facts })
    }
}

/// Returns true if the guest runs, false if it is paused.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if the VM is in another state.
pub(super) fn is_running(qmp: &mut Qmp) -> Result<bool> {
    match qmp.status()?.as_str() {
        "running" => Ok(true),
        "paused" | "prelaunch" => Ok(false),
        "postmigrate" => {
            Err(Error::usage("the VM is in state 'postmigrate', in which QEMU refuses another migration")
                .hint("resume the VM with QMP cont, then capture again"))
        }
        other => Err(Error::usage(format!("the VM is in state '{other}', expected running or paused"))
            .hint("wait for the end of this state, or resume the VM with QMP cont, then capture again")),
    }
}

impl Vm {
    /// Inspects a VM.
    ///
    /// # Errors
    /// Returns an error if the VM is busy, in a wrong state, or unsupported.
    pub fn inspect(qmp: &mut Qmp) -> Result<Vm> {
        // Conflicting operations are checked before the state: an active migration also changes the state, and its
        // error is more specific.
        busy::refuse(qmp)?;
        let was_running = is_running(qmp)?;
        let live = Live::inspect(qmp)?;
        let plan = plan(&live.argv, &live.facts)?;
        Vm::of(qmp, live, was_running, plan)
    }

    /// Creates a VM from the plan of its command line.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the VM has hot-plugged devices or memory, or other files
    /// open than those at its paths.
    pub fn of(qmp: &mut Qmp, live: Live, was_running: bool, mut plan: Plan) -> Result<Vm> {
        let unsupported = plugged(qmp, &plan)?;
        if !unsupported.is_empty() {
            return Err(Error::usage(format!("unsupported for clones: {}", unsupported.join("; ")))
                .hint("restart the VM without these devices, then capture again"));
        }
        let Live { pid, process, program, version, .. } = live;
        let chains = plan.disks.iter().flat_map(|disk| disk.live.image.chain());
        let images = HeldFiles::open(pid, chains.map(|image| image.path.as_path()))?;
        images.are_not_exchanged(&block_nodes(qmp)?)?;
        plan.warnings.extend(changed_files(pid, &plan.blobs)?);
        let addresses = addresses(qmp)?;
        Ok(Vm { pid, process, was_running, plan, images, addresses, program, version })
    }

    /// Opens the RAM files, and checks that the VM maps them as shared memory.
    pub fn ram_files(&self) -> Result<Vec<RamFile>> {
        let maps = procfs::maps(self.pid, |_, _| true)?.unwrap_or_default();
        let open = |ram: &Ram| {
            let (file, dir) = self.memory_file(&maps, &ram.id, &ram.mem_path)?;
            Ok((ram.file.clone(), ram.id.clone(), file, dir))
        };
        self.plan.ram.iter().map(open).collect()
    }

    /// Opens the ROM files like [`ram_files`](Self::ram_files). Returns each file with its name in the template.
    pub fn rom_files(&self) -> Result<Vec<(String, File)>> {
        let maps = procfs::maps(self.pid, |_, _| true)?.unwrap_or_default();
        let open = |rom: &Rom| Ok((rom.file.clone(), self.memory_file(&maps, &rom.id, &rom.mem_path)?.0));
        self.plan.roms.iter().map(open).collect()
    }

    /// Opens the file of a memory object; returns the file and its directory.
    fn memory_file(&self, maps: &[procfs::MapLine], id: &str, mem_path: &str) -> Result<(File, PathBuf)> {
        let path = self.path_of(Path::new(mem_path));
        let file = File::open(&path).map_err(|e| Error::io("cannot open the VM's memory file", &path, e))?;
        let meta = file
            .metadata()
            .map_err(|e| Error::io("cannot get the metadata of the VM's memory file", &path, e))?;
        // Some file systems (btrfs) have another device number in /proc/PID/maps than in stat(2).
        let named = |m: &&procfs::MapLine| m.path.ends_with(mem_path.trim_start_matches('/'));
        let is_it = |m: &&procfs::MapLine| m.ino == meta.ino() && (m.dev == meta.dev() || named(m));
        // If the files of two objects were exchanged, both are mapped, but not at the addresses of their objects.
        let is_there =
            |m: &procfs::MapLine| self.addresses.get(id).is_none_or(|at| (m.start..m.end).contains(at));
        if !meta.is_file() || !maps.iter().any(|m| is_it(&m) && !m.is_private() && is_there(m)) {
            return Err(Error::usage(format!("the VM does not map memory object '{id}' from this file"))
                .at(&path)
                .hint("set mem-path= to the path of a file, and do not replace the file while the VM runs"));
        }
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        Ok((file, dir))
    }

    /// Returns the launch recipe.
    pub fn recipe(&self) -> Value {
        let Plan { argv, disks, .. } = &self.plan;
        Recipe::qemu(self.program.clone(), self.version.clone(), argv.clone()).with_disks(disks).to_value()
    }

    /// Returns the files that QEMU read at startup and does not hold open.
    pub fn blob_files(&self) -> Vec<ImportFile> {
        let file = |blob: &Blob| ImportFile {
            name: blob.file.clone(),
            kind: FileKind::Blob,
            source: Source::Path(self.path_of(&blob.path)),
        };
        self.plan.blobs.iter().map(file).collect()
    }

    /// Same as [`path_of`], for the process of this VM.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        path_of(self.pid, path)
    }
}

/// Returns the addresses of memory objects in QEMU's address space, by id; empty if `info ramblock` of this QEMU has
/// another format.
fn addresses(qmp: &mut Qmp) -> Result<BTreeMap<String, u64>> {
    let table = qmp.run("human-monitor-command", json!({"command-line": "info ramblock"}))?;
    let row = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let id = words.next()?.rsplit('/').next()?.to_owned();
        // Skips page size and its unit, offset, used length and total length.
        let address = words.nth(5)?.strip_prefix("0x")?;
        Some((id, u64::from_str_radix(address, 16).ok()?))
    };
    Ok(table.as_str().unwrap_or_default().lines().filter_map(row).collect())
}

/// Returns the reason why an image is not a regular file that this process can read.
fn host_problem(pid: u32, path: &Path) -> Option<String> {
    let shown = path.display();
    match std::fs::metadata(path_of(pid, path)) {
        Ok(meta) if meta.is_file() => None,
        Ok(meta) if meta.file_type().is_block_device() => Some(format!("{shown} is a raw host disk")),
        Ok(_) => Some(format!("{shown} is not a regular file")),
        Err(e) => Some(format!("cannot access {shown}: {}", crate::error::errno_text(&e))),
    }
}

/// A ctime within this time after QEMU's start is not taken for a replaced file: libvirt starts the process first and
/// then changes the owner of the files.
const RELABEL_TIME: Duration = Duration::from_secs(60);

/// Warns about files that changed after QEMU read them. QEMU does not keep the files open, so only their times show a
/// change.
fn changed_files(pid: u32, blobs: &[Blob]) -> Result<Vec<String>> {
    let Some(started) = times::started_at(pid)? else { return Err(no_vm_here(pid)) };
    let changed = |blob: &&Blob| {
        let meta = std::fs::metadata(path_of(pid, &blob.path)).ok()?;
        let at = |seconds: i64, nanoseconds: i64| {
            Some(UNIX_EPOCH + Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?))
        };
        let written = at(meta.mtime(), meta.mtime_nsec())?;
        // The inode change time detects an older file that was moved to the path.
        let moved = at(meta.ctime(), meta.ctime_nsec())?;
        (written > started || moved > started + RELABEL_TIME).then_some(())
    };
    let note = |blob: &Blob| {
        format!(
            "{} (template file '{}') was changed after QEMU read it: a clone that reboots uses the new file",
            blob.path.display(),
            blob.file
        )
    };
    Ok(blobs.iter().filter(|blob| changed(blob).is_some()).map(note).collect())
}

/// Describes unsupported devices and memory that were plugged in or out while the VM ran, which the command line does
/// not show.
fn plugged(qmp: &mut Qmp, plan: &Plan) -> Result<Vec<String>> {
    let mut unsupported = vec![];
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
                unsupported.push(format!("device {driver} ({name})"));
            }
        }
    }
    if devices != plan.devices && unsupported.is_empty() {
        unsupported.push(format!(
            "devices that were plugged in or out ({} on the command line, {devices} in the VM)",
            plan.devices
        ));
    }
    for memory in qmp.run("query-memdev", json!({}))?.as_array().into_iter().flatten() {
        let id = memory.get("id").and_then(Value::as_str).unwrap_or("without id");
        if !plan.ram.iter().any(|ram| ram.id == id) && !plan.roms.iter().any(|rom| rom.id == id) {
            unsupported.push(format!("memory '{id}'"));
        }
    }
    Ok(unsupported)
}
