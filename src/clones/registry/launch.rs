//! A launch: one call that makes clones, and holds them until all are ready.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use super::entry::{CloneStore, Entry, Kind, Touched};
use super::layout::{CLONES, LAUNCHES, RECORD, clones_dir, random_id, remove_directory, shared_name};
use super::process_tree::{self, ProcessTrees};
use super::records::of_launch;
use super::removal::remove_all;
use super::shared_record::SharedRecord;
use crate::clones::baseline::Baseline;
use crate::clones::counted;
use crate::control::places;
use crate::control::runtime::{self, is_plain_name, trusted_file};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::sys::probe;
use crate::sys::process::ProcessId;
use crate::sys::process::holders;
use crate::units::Bytes;

/// Time limit for another process to clean up a launch, or for a child to execute its program.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);

/// The properties of a clone before it is launched.
#[derive(Debug, Clone, Copy)]
pub struct NewEntry<'a> {
    /// Template reference given at launch.
    pub name: &'a str,
    /// Digest of the template.
    pub template: &'a str,
    /// Store of the template.
    pub store: &'a CloneStore,
    /// Kind of process.
    pub kind: Kind,
    /// Pages that a simulated clone is to touch.
    pub touched: Option<Touched>,
    /// Labels given at launch.
    pub labels: &'a BTreeMap<String, String>,
    /// Directory of the disks, if it is not the clone's directory.
    pub disk_dir: Option<&'a Path>,
}

fn staging_prefix(launch: &str) -> String {
    format!(".{launch}-")
}

/// One call that makes clones, and holds them until all are ready.
#[derive(Debug)]
pub struct Launch {
    id: String,
    /// Locked shared, and inherited by every child until it executes its program. A process that gets the exclusive
    /// lock can identify all processes of this launch by their environment.
    marker: OnceLock<fs::File>,
    /// The directory of all records.
    clones: OnceLock<Directory>,
    baseline: Option<Baseline>,
    watchdog: Option<ProcessId>,
}

impl Launch {
    /// Prepares a launch of this process, without creating its marker.
    ///
    /// # Errors
    /// Returns an error if the identity of this process cannot be read.
    pub fn prepare() -> Result<Launch> {
        // The id names the launcher, so an empty marker file is complete as soon as it exists.
        let me = ProcessId::current()?;
        let mut name = random_id()?;
        // Simulated clones have their directory under this name.
        while clones_dir().join(&name).exists() {
            name = random_id()?;
        }
        let mut id = format!("{name}.{}.{}", me.pid, me.identity);
        if let Some(namespace) = probe::pid_namespace() {
            id.push_str(&format!(".{namespace}"));
        }
        Ok(Launch { id, marker: OnceLock::new(), clones: OnceLock::new(), baseline: None, watchdog: None })
    }

    /// Creates the marker. From now on, the clones of this launch are stopped if this process dies.
    ///
    /// # Errors
    /// Returns an error if the runtime directory cannot be written.
    pub fn start(&self) -> Result<()> {
        let all = runtime::create(LAUNCHES)?;
        places::expect_utf8("runtime directory", all.path())?;
        let make = || {
            let marker = all.create(&self.id, 0o600)?;
            flock(&marker, FlockOperation::LockShared)?;
            Ok(marker)
        };
        let marker =
            make().map_err(|e| runtime::failed("cannot start a launch", &all.path_of(&self.id), e))?;
        self.marker.get_or_init(|| marker);
        let clones = runtime::create(CLONES)?;
        self.clones.get_or_init(|| clones);
        Ok(())
    }

    /// Returns true if no other launch is in progress.
    ///
    /// # Errors
    /// Returns an error if the markers of launches cannot be read.
    pub fn is_alone(&self) -> Result<bool> {
        let Some(all) = runtime::open(LAUNCHES)? else { return Ok(true) };
        let names =
            all.names().map_err(|e| Error::io("cannot read the markers of launches", all.path(), e))?;
        Ok(names.iter().all(|name| name.to_str() == Some(&self.id)))
    }

    /// Sets the free memory of the host before the first clone.
    pub fn set_baseline(&mut self, baseline: Option<Baseline>) {
        self.baseline = baseline;
    }

    /// Sets the process that writes the exit records of the clones.
    pub fn set_watchdog(&mut self, watchdog: ProcessId) {
        self.watchdog = Some(watchdog);
    }

    /// Returns the id of the launch.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Creates the directory and the record of a clone.
    ///
    /// # Errors
    /// Returns an error if the runtime directory cannot be written.
    pub fn create(&self, new: &NewEntry<'_>, index: u32) -> Result<Entry> {
        let all = self.clones()?;
        let failed = |path: &Path, e| runtime::failed("cannot create the directory of a clone", path, e);
        // The directory is renamed into place with its record. An incomplete directory has the launch's id in its name.
        let staged = format!("{}{}", staging_prefix(&self.id), index);
        let staging = all.path_of(&staged);
        let directory = all.create_folder(&staged, 0o700).map_err(|e| failed(&staging, e))?;
        let mut entry = Entry { index, dir: staging.clone(), ..self.entry(new) };
        loop {
            entry.id = random_id()?;
            entry.dir = all.path_of(&entry.id);
            entry.save_in(&directory)?;
            match all.rename(&staged, all, &entry.id) {
                Ok(()) => return Ok(entry),
                // A directory that is not empty belongs to another clone.
                Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {}
                Err(e) => return Err(failed(&entry.dir, e)),
            }
        }
    }

    /// Creates the record of the simulated clones of this launch, without any clone. `mapped` are the first lines of
    /// the log of each clone, and `touched` describes the pages that each has touched.
    ///
    /// # Errors
    /// Returns an error if the runtime directory cannot be written.
    pub fn create_shared(&self, new: &NewEntry<'_>, mapped: String, touched: String) -> Result<SharedRecord> {
        let all = self.clones()?;
        let name = shared_name(&self.id);
        let entry = Entry { id: name.to_owned(), dir: all.path_of(name), ..self.entry(new) };
        SharedRecord::create(all, entry, mapped, touched)
    }

    fn entry(&self, new: &NewEntry<'_>) -> Entry {
        Entry {
            id: String::new(),
            pid: 0,
            identity: 0,
            name: new.name.to_owned(),
            template: new.template.to_owned(),
            store: new.store.clone(),
            kind: new.kind,
            dir: PathBuf::new(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            index: 0,
            launch: self.id.clone(),
            baseline: self.baseline,
            touched: new.touched,
            labels: new.labels.clone(),
            ports: BTreeMap::new(),
            uuid: None,
            disks: BTreeSet::new(),
            disk_dir: new.disk_dir.map(Path::to_owned),
            jail: None,
            jail_bytes: Bytes::ZERO,
            pid_namespace: probe::pid_namespace(),
            watchdog: self.watchdog,
            ending: None,
        }
    }

    fn clones(&self) -> Result<&Directory> {
        self.clones.get().ok_or_else(|| Error::failed("the launch was not started"))
    }

    /// Releases all clones of this launch at once.
    ///
    /// # Errors
    /// Returns an error if the marker cannot be removed: the clones then still belong to the launch.
    pub fn commit(self) -> Result<()> {
        let failed = |e| runtime::failed("cannot release the clones of a launch", Path::new(&self.id), e);
        let all = runtime::open(LAUNCHES)?.ok_or_else(|| failed(ErrorKind::NotFound.into()))?;
        all.remove_file(&self.id).map_err(failed)
    }

    /// Stops all clones of this launch, and removes their resources.
    ///
    /// # Errors
    /// Returns an error if a clone cannot be killed or its directory cannot be removed.
    pub fn abort(self) -> Result<()> {
        drop(self.marker);
        abort(&self.id).map(drop)
    }
}

/// Kills all clones of a launch that was not released, and removes their resources. Returns the removed records, none
/// for a released launch.
///
/// # Errors
/// Returns an error if a process cannot be killed or a directory cannot be removed. All other clones are removed, and
/// the marker is kept for the next attempt.
pub fn abort(launch: &str) -> Result<Vec<Entry>> {
    let Some(launches) = runtime::open(LAUNCHES)?.filter(|_| is_plain_name(launch)) else {
        return Ok(vec![]);
    };
    let marker = launches.path_of(launch);
    let lock = match trusted_file(&launches, launch) {
        Ok(lock) => lock,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => {
            return Err(Error::failed("cannot open the record of a launch")
                .at(&marker)
                .because(e)
                .hint("remove this file if no 'stencil clone' is running"));
        }
    };
    // The watchdog and another command may clean up at the same time, and a child may not have executed its program
    // yet.
    match file_locks::wait(&lock, true, CLEANUP_TIMEOUT, || false) {
        Ok(true) => {}
        Ok(false) => {
            let limit = CLEANUP_TIMEOUT.as_secs();
            let what = format!("timed out after {limit} s waiting for the cleanup of an unfinished launch");
            let holders = holders::list_pids(&file_locks::flock_holders(&lock));
            return Err(Error::try_again(what)
                .at(&marker)
                .hint(format!("resume or end the holder of the lock: {holders}")));
        }
        Err(e) => return Err(Error::io("cannot lock", &marker, e)),
    }
    if !launches.has(launch) {
        return Ok(vec![]);
    }
    let all = of_launch(launch)?;
    let mut problem = process_tree::kill(&all).err();
    // The guest of a clone that cannot be killed still uses the clone's directory.
    let left = problem.is_some().then(|| ProcessTrees::scan(&all));
    let gone = |entry: &&Entry| left.as_ref().is_none_or(|left| left.of(entry).is_empty());
    problem = problem.or(remove_all(all.iter().filter(gone)).err());
    let shared = clones_dir().join(shared_name(launch));
    // If the directory has the record of a clone, the directory belongs to a clone with this name as its id.
    if problem.is_none() && !shared.join(RECORD).exists() {
        problem = remove_directory(&shared).err();
    }
    let prefix = staging_prefix(launch);
    for directory in fs::read_dir(clones_dir()).into_iter().flatten().flatten() {
        if directory.file_name().to_string_lossy().starts_with(&prefix) {
            problem = problem.or(remove_directory(&directory.path()).err());
        }
    }
    if let Some(problem) = problem {
        return Err(problem);
    }
    match launches.remove_file(launch) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("cannot remove", &marker, e)),
        _ => Ok(all),
    }
}

/// Returns the launcher that the launch's id names; `None` for a launcher of another PID namespace.
fn launcher(launch: &str) -> Option<ProcessId> {
    let mut parts = launch.split('.').skip(1);
    let (pid, identity) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    // Missing without `/proc`.
    let namespace: Option<u64> = parts.next().map(str::parse).transpose().ok()?;
    let ours = namespace.is_none_or(|its| Some(its) == probe::pid_namespace());
    ours.then_some(ProcessId { pid, identity })
}

/// Stops the remaining clones of launchers that died before all of their clones were ready.
///
/// # Errors
/// Returns the first error if the records cannot be read or a clone cannot be stopped. All other launches are cleaned
/// up.
pub fn sweep() -> Result<()> {
    let mut problem = None;
    let Some(all) = runtime::open(LAUNCHES)? else { return Ok(()) };
    let names = all.names().map_err(|e| Error::io("cannot read the markers of launches", all.path(), e))?;
    for launch in names.iter().filter_map(|name| name.to_str()) {
        if launcher(launch).is_none_or(|launcher| launcher.is_alive()) {
            continue;
        }
        match abort(launch) {
            Ok(gone) => log::info!(
                "the launcher of launch {launch} died; removed {}",
                counted(gone.len() as u64, "clone", "clones")
            ),
            Err(error) => {
                problem.get_or_insert(error);
            }
        }
    }
    problem.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_launcher_from_the_id() {
        let me = ProcessId::current().unwrap();
        let launch = Launch::prepare().unwrap();
        assert_eq!(launcher(launch.id()), Some(me));
        let (without_namespace, _) = launch.id().rsplit_once('.').unwrap();
        assert_eq!(launcher(without_namespace), Some(me));
        assert_eq!(launcher(&format!("{without_namespace}.1")), None);
        assert_eq!(launcher("c0000000"), None);
    }
}
