//! The records of clones that were launched here: one folder each in `runtime_dir()/clones`.
//!
//! A folder is made before its process and removed after it, so a process without a folder cannot be
//! ours, and a folder without a living process names a clone that has ended.
//!
//! Clones of one call belong to one [`Launch`], which holds them by one marker file: taking it away lets all
//! of them go at once. If the launcher dies before, whoever comes next ends what is left ([`sweep`]).

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::family;
use crate::control::runtime_dir;
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::procfs;

const RECORD: &str = "clone.json";

/// What kind of process a clone is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One of our own workers that maps the template and touches pages of it.
    Simulated,
    /// A QEMU that was resumed by the template's recipe.
    Qemu,
    /// Any command of the user's.
    Command,
}

impl Kind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Simulated => "simulated",
            Kind::Qemu => "qemu",
            Kind::Command => "command",
        }
    }
}

/// Pages that a simulated clone was told to touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Pages read and not written.
    pub read_pages: u64,
    /// Pages written.
    pub written_pages: u64,
}

/// One clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Short and unique in this runtime directory; begins with a letter, so it is never taken for a pid.
    pub id: String,
    /// Its process; 0 while there is none.
    pub pid: u32,
    /// When that process started, in clock ticks since boot.
    pub start_time: u64,
    /// The template as it was asked for.
    pub name: String,
    /// The template's digest.
    pub template: String,
    /// What kind of process it is.
    pub kind: Kind,
    /// Its own folder.
    pub dir: PathBuf,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Its number within its launch, from 0.
    pub index: u32,
    /// The launch that it belongs to.
    pub launch: String,
    /// What a simulated clone was told to touch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub touched: Option<Touched>,
    /// Its ports of the host: the N of `{port:N}`, and which it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// The machine's UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

impl Entry {
    /// Its process, once it has one.
    pub fn process(&self) -> Option<ProcessId> {
        (self.pid != 0).then_some(ProcessId { pid: self.pid, start_time: self.start_time })
    }

    /// True while its launcher still holds it.
    pub fn is_launching(&self) -> bool {
        is_held(&self.launch)
    }

    /// True while its process lives.
    pub fn is_alive(&self) -> bool {
        self.process().is_some_and(|process| process.is_alive())
    }

    /// Where it writes what it has to say.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Where the first serial port of its guest goes.
    pub fn serial_path(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    /// The QMP socket of a QEMU clone.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// Notes its process.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn set_process(&mut self, process: ProcessId) -> Result<()> {
        (self.pid, self.start_time) = (process.pid, process.start_time);
        self.save()
    }

    /// Writes the record: readers see the old one or the new one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<()> {
        let path = self.dir.join(RECORD);
        let fresh = self.dir.join("clone.json.new");
        let write = || -> std::io::Result<()> {
            let mut file = fs::File::create(&fresh)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            fs::rename(&fresh, &path)
        };
        write().map_err(|e| Error::io("cannot write the record of a clone", &path, e))
    }

    /// Removes its folder and gives its ports back. One that is gone already is fine.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        super::ports::give_back(self);
        remove_folder(&self.dir)
    }

    /// Kills its processes and removes its folder.
    ///
    /// # Errors
    /// When a process cannot be killed, or the folder not removed.
    pub fn destroy(&self) -> Result<()> {
        family::kill(std::slice::from_ref(self))?;
        self.remove()
    }
}

/// What is known of a clone before it exists.
#[derive(Debug, Clone, Copy)]
pub struct NewEntry<'a> {
    /// The template as it was asked for.
    pub name: &'a str,
    /// The template's digest.
    pub template: &'a str,
    /// What kind of process it will be.
    pub kind: Kind,
    /// Its number within its launch, from 0.
    pub index: u32,
    /// What a simulated clone is told to touch.
    pub touched: Option<Touched>,
}

fn staging_prefix(launch: &str) -> String {
    format!(".{launch}-")
}

/// The runtime directory from the root: clones and helpers do not stay in this process's folder.
pub fn runtime_root() -> PathBuf {
    std::path::absolute(runtime_dir()).unwrap_or_else(|_| runtime_dir())
}

/// The folder that holds all records.
pub fn clones_dir() -> PathBuf {
    runtime_root().join("clones")
}

/// How long another one may take to clear up a launch, or a child to execute its program.
const CLEARING: Duration = Duration::from_secs(30);

fn launches_dir() -> PathBuf {
    runtime_root().join("launches")
}

/// One call that makes clones, and holds them until all are ready.
#[derive(Debug)]
pub struct Launch {
    id: String,
    /// Locked shared, and inherited by every child until it executes its program: who takes the lock alone meets no
    /// process of this launch that cannot be told yet by what it was given.
    marker: OnceLock<fs::File>,
}

impl Launch {
    /// A launch of this process that has not begun.
    ///
    /// # Errors
    /// When the kernel does not say who this process is.
    pub fn prepare() -> Result<Launch> {
        // The name says whose it is, so that the marker is whole as soon as it exists.
        let me = ProcessId::me()?;
        let id = format!("{}.{}.{}", random_id()?, me.pid, me.start_time);
        Ok(Launch { id, marker: OnceLock::new() })
    }

    /// Begins: from now on the clones of this launch live and die with this process.
    ///
    /// # Errors
    /// When the runtime directory cannot be written.
    pub fn begin(&self) -> Result<()> {
        let all = launches_dir();
        let make = || {
            fs::create_dir_all(&all)?;
            let marker = fs::File::create_new(all.join(&self.id))?;
            flock(&marker, FlockOperation::LockShared)?;
            Ok(marker)
        };
        let marker = make().map_err(|e| {
            Error::io("cannot write to the runtime directory", &all, e)
                .remedy("run it as root, or set STENCIL_RUNTIME_DIR to a folder of yours")
        })?;
        self.marker.get_or_init(|| marker);
        Ok(())
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Makes folder and record of a clone to be.
    ///
    /// # Errors
    /// When the runtime directory cannot be written.
    pub fn create(&self, new: &NewEntry<'_>) -> Result<Entry> {
        let all = clones_dir();
        let failed = |path: &Path, e| Error::io("cannot make the folder of a clone", path, e);
        fs::create_dir_all(&all).map_err(|e| failed(&all, e))?;
        // The folder appears with its record in it; what is cut off before bears the launch's name.
        let staging = all.join(format!("{}{}", staging_prefix(&self.id), new.index));
        fs::DirBuilder::new().mode(0o700).create(&staging).map_err(|e| failed(&staging, e))?;
        let mut entry = Entry {
            id: String::new(),
            pid: 0,
            start_time: 0,
            name: new.name.to_owned(),
            template: new.template.to_owned(),
            kind: new.kind,
            dir: staging.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            index: new.index,
            launch: self.id.clone(),
            touched: new.touched,
            ports: BTreeMap::new(),
            uuid: None,
        };
        loop {
            entry.id = random_id()?;
            entry.dir.clone_from(&staging);
            entry.save()?;
            entry.dir = all.join(&entry.id);
            match fs::rename(&staging, &entry.dir) {
                Ok(()) => return Ok(entry),
                // A folder that is not empty is another clone's.
                Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {}
                Err(e) => return Err(failed(&entry.dir, e)),
            }
        }
    }

    /// Lets all clones of this launch go, at once.
    ///
    /// # Errors
    /// When the marker cannot be removed: then the clones still belong to the launch.
    pub fn commit(self) -> Result<()> {
        let marker = launches_dir().join(&self.id);
        fs::remove_file(&marker).map_err(|e| Error::io("cannot let the clones go", &marker, e))
    }

    /// Ends all clones of this launch and removes what they had.
    ///
    /// # Errors
    /// When one of them does not die or its folder cannot be removed.
    pub fn abort(self) -> Result<()> {
        drop(self.marker);
        abort(&self.id).map(drop)
    }
}

/// True until the clones of that launch are let go or removed.
pub fn is_held(launch: &str) -> bool {
    launches_dir().join(launch).exists()
}

/// Ends everything of one launch that was not let go; nothing, when it was. Gives what it removed.
///
/// # Errors
/// When a process does not die or a folder cannot be removed.
pub fn abort(launch: &str) -> Result<Vec<Entry>> {
    let marker = launches_dir().join(launch);
    let Ok(lock) = fs::File::open(&marker) else { return Ok(vec![]) };
    // The watchdog and another command may do it at one time, and a child may not have executed its program yet.
    let until = Instant::now() + CLEARING;
    while let Err(e) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        if e != rustix::io::Errno::WOULDBLOCK {
            return Err(Error::io("cannot lock", &marker, e.into()));
        }
        if Instant::now() >= until {
            let what = format!("a broken launch could not be cleared up within {} s", CLEARING.as_secs());
            return Err(Error::try_again(what).at(&marker));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if !marker.exists() {
        return Ok(vec![]);
    }
    let all: Vec<Entry> = list()?.into_iter().filter(|e| e.launch == launch).collect();
    family::kill(&all)?;
    all.iter().try_for_each(Entry::remove)?;
    let prefix = staging_prefix(launch);
    for folder in fs::read_dir(clones_dir()).into_iter().flatten().flatten() {
        if folder.file_name().to_string_lossy().starts_with(&prefix) {
            remove_folder(&folder.path())?;
        }
    }
    match fs::remove_file(&marker) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("cannot remove", &marker, e)),
        _ => Ok(all),
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    // A worker that dies just now may still have put its log there.
    for _ in 0..50 {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(10))
            }
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the folder of a clone", path, e));
            }
            _ => return Ok(()),
        }
    }
    Err(Error::failed("the folder of a clone is still being written to").at(path))
}

/// All records, oldest first, clones that have ended among them.
///
/// # Errors
/// When the folder of clones cannot be read. A record that cannot be read is logged and left out.
pub fn list() -> Result<Vec<Entry>> {
    let all = clones_dir();
    let folders = match fs::read_dir(&all) {
        Ok(folders) => folders,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Error::io("cannot read the folder of clones", &all, e)),
    };
    let mut entries = vec![];
    for folder in folders {
        let path = folder.map_err(|e| Error::io("cannot read the folder of clones", &all, e))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        match load(&path) {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => {}
            Err(error) => log::warn!("{error}"),
        }
    }
    entries.sort_by(|a, b| (a.created, a.index, &a.id).cmp(&(b.created, b.index, &b.id)));
    Ok(entries)
}

/// The clone with that id.
///
/// # Errors
/// [`Code::NotFound`](crate::error::Code::NotFound) when there is none.
pub fn find(id: &str) -> Result<Entry> {
    // An id is one folder's name, never a path.
    let entry = if id.chars().all(|c| c.is_ascii_alphanumeric()) && !id.is_empty() {
        load(&clones_dir().join(id))?
    } else {
        None
    };
    entry.ok_or_else(|| {
        Error::not_found(format!("no clone has the id '{id}'"))
            .remedy("see `stencil ps` for the clones that are")
    })
}

/// Ends what launchers left behind that died before all of their clones were ready. Gives what it removed.
///
/// # Errors
/// When the records cannot be read or something cannot be ended.
pub fn sweep() -> Result<Vec<Entry>> {
    let mut swept = vec![];
    let Ok(markers) = fs::read_dir(launches_dir()) else { return Ok(swept) };
    for marker in markers.filter_map(std::result::Result::ok) {
        let Some(launch) = marker.file_name().to_str().map(str::to_owned) else { continue };
        let owner = launch.split_once('.').and_then(|(_, owner)| {
            let (pid, start_time) = owner.split_once('.')?;
            Some(ProcessId { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
        });
        if owner.is_some_and(|owner| !owner.is_alive()) {
            let gone = abort(&launch)?;
            log::info!("launch {launch} had lost its launcher: {} clones removed", gone.len());
            swept.extend(gone);
        }
    }
    Ok(swept)
}

fn load(dir: &Path) -> Result<Option<Entry>> {
    let path = dir.join(RECORD);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(Error::io("cannot read the record of a clone", &path, e)),
    };
    let mut entry: Entry = serde_json::from_slice(&bytes).map_err(|e| {
        Error::failed(format!("the record of a clone cannot be understood: {e}"))
            .at(&path)
            .remedy("if no process of that clone runs, remove its folder")
    })?;
    // What is removed later is where the record was found, not where it says.
    entry.dir = dir.to_owned();
    Ok(Some(entry))
}

/// A short name that nobody else has: `c` and seven hex digits.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn random_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let uuid = procfs::read_text(path)?;
    let hex: String = uuid.chars().filter(char::is_ascii_hexdigit).take(7).collect();
    if hex.len() < 7 {
        return Err(Error::failed("the kernel gives no random number").at(path));
    }
    Ok(format!("c{hex}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry {
            id: "c0123456".into(),
            pid: 12,
            start_time: 34,
            name: "web:v1".into(),
            template: "ab".repeat(32),
            kind: Kind::Simulated,
            dir: dir.path().to_owned(),
            created: 56,
            index: 7,
            launch: "c7654321".into(),
            touched: Some(Touched { read_pages: 8, written_pages: 9 }),
            ports: BTreeMap::from([("80".into(), 40_000)]),
            uuid: None,
        };
        entry.save().unwrap();
        assert_eq!(load(dir.path()).unwrap(), Some(entry));
        fs::write(dir.path().join(RECORD), "{").unwrap();
        assert!(load(dir.path()).is_err());
    }

    #[test]
    fn ids_are_no_pids_and_no_paths() {
        assert!(random_id().unwrap().parse::<u32>().is_err());
        assert!(find("../mounts").is_err());
        assert!(find("").is_err());
    }
}
