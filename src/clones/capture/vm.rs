//! What there is to know of a VM before it is captured; nothing of it is changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::busy;
use super::disks::block_nodes;
use super::open_files::HeldFiles;
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{Blob, Facts, LiveDisk, Plan, Ram, Recipe, Rom, is_device_for_clones, plan};
use crate::error::{Error, Result};
use crate::store::{FileKind, ImportFile, Source};
use crate::sys::process::ProcessId;
use crate::sys::procfs;

/// A VM that clones can be made of.
pub(super) struct Vm {
    pub pid: u32,
    pub process: ProcessId,
    pub was_running: bool,
    pub plan: Plan,
    /// The images of its disks, and those beneath them.
    pub images: HeldFiles,
    /// Where its memory objects are mapped, by id, as far as QEMU tells.
    addresses: BTreeMap<String, u64>,
    program: String,
    version: String,
}

/// A RAM file: its name in the template, its backend, the file, the folder that it lies in.
pub(super) type RamFile = (String, String, File, PathBuf);

/// A VM as it is found.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub pid: u32,
    pub process: ProcessId,
    /// Its program.
    pub program: String,
    version: String,
    /// Its command line, without the program.
    pub argv: Vec<String>,
    /// What that does not say.
    pub facts: Facts,
}

impl Live {
    /// Finds out all about the VM, and changes nothing.
    pub fn look(qmp: &mut Qmp) -> Result<Live> {
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
        let mut disks = LiveDisk::all(&qmp.run("query-block", json!({}))?);
        for disk in disks.iter_mut().filter(|disk| disk.problem.is_none()) {
            disk.problem = disk.image.chain().find_map(|image| host_problem(pid, &image.path));
        }
        let facts = Facts { machine_type, disks };
        Ok(Live { pid, process, program, version, argv: argv.to_vec(), facts })
    }
}

/// Whether the guest runs.
///
/// # Errors
/// When it is in a state in which it cannot be captured.
pub(super) fn is_running(qmp: &mut Qmp) -> Result<bool> {
    match qmp.status()?.as_str() {
        "running" => Ok(true),
        "paused" | "prelaunch" => Ok(false),
        "postmigrate" => {
            Err(Error::usage("this VM stands still after a migration, and QEMU does not migrate it twice")
                .remedy("let it run with QMP cont, then capture again"))
        }
        other => Err(Error::usage(format!("this VM is in state '{other}'; it must be running or paused"))
            .remedy("wait until its state passes, or let it run with QMP cont, then capture again")),
    }
}

impl Vm {
    /// Finds out all about it, and changes nothing.
    pub fn look(qmp: &mut Qmp) -> Result<Vm> {
        // A migration that is under way shows in the state as well, and says more.
        busy::refuse(qmp)?;
        let was_running = is_running(qmp)?;
        let live = Live::look(qmp)?;
        let plan = plan(&live.argv, &live.facts)?;
        Vm::of(qmp, live, was_running, plan)
    }

    /// The VM of that plan.
    ///
    /// # Errors
    /// When it has something that its command line does not say, or other files than those at its paths.
    pub fn of(qmp: &mut Qmp, live: Live, was_running: bool, mut plan: Plan) -> Result<Vm> {
        let against = plugged(qmp, &plan)?;
        if !against.is_empty() {
            return Err(Error::usage(format!("clones cannot have: {}", against.join("; ")))
                .remedy("start the VM without it, then capture again"));
        }
        let Live { pid, process, program, version, .. } = live;
        let chains = plan.disks.iter().flat_map(|disk| disk.live.image.chain());
        let images = HeldFiles::open(pid, chains.map(|image| image.path.as_path()))?;
        images.are_not_exchanged(&block_nodes(qmp)?)?;
        plan.warnings.extend(changed_files(pid, &plan.blobs)?);
        let addresses = addresses(qmp)?;
        Ok(Vm { pid, process, was_running, plan, images, addresses, program, version })
    }

    /// Opens the files that hold RAM, and makes sure that the VM really has them mapped.
    pub fn ram_files(&self) -> Result<Vec<RamFile>> {
        let maps = procfs::maps(self.pid, |_, _| true)?.unwrap_or_default();
        let open = |ram: &Ram| {
            let (file, dir) = self.memory_file(&maps, &ram.id, &ram.mem_path)?;
            Ok((ram.file.clone(), ram.id.clone(), file, dir))
        };
        self.plan.ram.iter().map(open).collect()
    }

    /// Opens the files that hold its ROMs, as [`ram_files`](Self::ram_files) does. Each comes with its name in the
    /// template.
    pub fn rom_files(&self) -> Result<Vec<(String, File)>> {
        let maps = procfs::maps(self.pid, |_, _| true)?.unwrap_or_default();
        let open = |rom: &Rom| Ok((rom.file.clone(), self.memory_file(&maps, &rom.id, &rom.mem_path)?.0));
        self.plan.roms.iter().map(open).collect()
    }

    /// The file of a memory object, and the folder that it lies in.
    fn memory_file(&self, maps: &[procfs::MapLine], id: &str, mem_path: &str) -> Result<(File, PathBuf)> {
        let path = self.path_of(Path::new(mem_path));
        let file = File::open(&path).map_err(|e| Error::io("cannot open the VM's memory file", &path, e))?;
        let meta = file.metadata().map_err(|e| Error::io("cannot look at the VM's memory file", &path, e))?;
        // Some file systems (btrfs) show another device number in maps than in stat.
        let named = |m: &&procfs::MapLine| m.path.ends_with(mem_path.trim_start_matches('/'));
        let is_it = |m: &&procfs::MapLine| m.ino == meta.ino() && (m.dev == meta.dev() || named(m));
        // Files of two objects that were exchanged are both mapped.
        let is_there =
            |m: &procfs::MapLine| self.addresses.get(id).is_none_or(|at| (m.start..m.end).contains(at));
        if !meta.is_file() || !maps.iter().any(|m| is_it(&m) && !m.is_private() && is_there(m)) {
            return Err(Error::usage(format!(
                "the VM does not share the memory of '{id}' through this file"
            ))
            .at(&path)
            .remedy("give mem-path= the path of a file, and do not replace it while the VM runs"));
        }
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        Ok((file, dir))
    }

    /// The recipe of clones.
    pub fn recipe(&self) -> Value {
        let Plan { argv, disks, .. } = &self.plan;
        Recipe::qemu(self.program.clone(), self.version.clone(), argv.clone()).with_disks(disks).to_value()
    }

    /// Files that QEMU read when it started and has not open any more.
    pub fn blob_files(&self) -> Vec<ImportFile> {
        let file = |blob: &Blob| ImportFile {
            name: blob.file.clone(),
            kind: FileKind::Blob,
            source: Source::Path(self.path_of(&blob.path)),
        };
        self.plan.blobs.iter().map(file).collect()
    }

    /// A path as that process sees it, whatever its root and working directory are.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        path_of(self.pid, path)
    }
}

pub(super) fn no_vm_here(pid: u32) -> Error {
    Error::failed(format!("process {pid}, which opened the QMP socket, is no QEMU of this host"))
        .remedy("run stencil on the host and in the pid namespace of the QEMU")
}

/// A path as that process sees it, whatever its root and working directory are. Where its root is ours, the path is
/// good for longer than the process lives.
pub(super) fn path_of(pid: u32, path: &Path) -> PathBuf {
    let of_process = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let same = |name: &str| {
        let (own, its) = (Path::new("/proc/self").join(name), of_process(name));
        identity(&own).is_some_and(|own| Some(own) == identity(&its))
    };
    if same("root") && same("ns/mnt") {
        if path.is_absolute() {
            return path.to_owned();
        }
        if let Ok(folder) = std::fs::read_link(of_process("cwd")) {
            return folder.join(path);
        }
    }
    match path.strip_prefix("/") {
        Ok(rest) => of_process("root").join(rest),
        Err(_) => of_process("cwd").join(path),
    }
}

/// Where memory objects are mapped in QEMU's process, by id; none where this QEMU tells it in other words.
fn addresses(qmp: &mut Qmp) -> Result<BTreeMap<String, u64>> {
    let table = qmp.run("human-monitor-command", json!({"command-line": "info ramblock"}))?;
    let row = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let id = words.next()?.rsplit('/').next()?.to_owned();
        // Page size and its unit, offset, used and total length.
        let address = words.nth(5)?.strip_prefix("0x")?;
        Some((id, u64::from_str_radix(address, 16).ok()?))
    };
    Ok(table.as_str().unwrap_or_default().lines().filter_map(row).collect())
}

/// Why an image is no plain file.
fn host_problem(pid: u32, path: &Path) -> Option<String> {
    let shown = path.display();
    match std::fs::metadata(path_of(pid, path)) {
        Ok(meta) if meta.is_file() => None,
        Ok(meta) if meta.file_type().is_block_device() => Some(format!("{shown} is a raw disk of the host")),
        Ok(_) => Some(format!("{shown} is no regular file")),
        Err(e) => Some(format!("{shown} cannot be read ({})", crate::error::errno_text(&e))),
    }
}

/// libvirt starts QEMU's process first and gives it the files (chown) then: their inodes change within this time.
const RELABEL_TIME: Duration = Duration::from_secs(60);

/// Says which of these files are not those that QEMU has read: it does not keep them open, so nothing else tells.
fn changed_files(pid: u32, blobs: &[Blob]) -> Result<Vec<String>> {
    let Some(started) = procfs::started_at(pid)? else { return Err(no_vm_here(pid)) };
    let changed = |blob: &&Blob| {
        let meta = std::fs::metadata(path_of(pid, &blob.path)).ok()?;
        let at = |seconds: i64, nanoseconds: i64| {
            Some(UNIX_EPOCH + Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?))
        };
        let written = at(meta.mtime(), meta.mtime_nsec())?;
        // A file with an old time that was moved there.
        let moved = at(meta.ctime(), meta.ctime_nsec())?;
        (written > started || moved > started + RELABEL_TIME).then_some(())
    };
    let note = |blob: &Blob| {
        format!(
            "{} was changed after QEMU had read it ({}): a clone that reboots uses the new one",
            blob.path.display(),
            blob.file
        )
    };
    Ok(blobs.iter().filter(|blob| changed(blob).is_some()).map(note).collect())
}

/// What was plugged in while the VM ran, which does not stand in its command line.
fn plugged(qmp: &mut Qmp, plan: &Plan) -> Result<Vec<String>> {
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
    for memory in qmp.run("query-memdev", json!({}))?.as_array().into_iter().flatten() {
        let id = memory.get("id").and_then(Value::as_str).unwrap_or("without id");
        if !plan.ram.iter().any(|ram| ram.id == id) && !plan.roms.iter().any(|rom| rom.id == id) {
            against.push(format!("memory '{id}'"));
        }
    }
    Ok(against)
}
