//! A launch: one call that makes clones, and holds them until all are ready.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use super::entry::{Entry, Kind, StoreOfClone, Touched, remove_folder};
use super::{CLONES, LAUNCHES, clones_dir, list, random_id};
use crate::clones::baseline::Baseline;
use crate::clones::family::{self, Families};
use crate::control::places;
use crate::control::runtime::{self, is_plain_name, trusted_file};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::{locks, probe, users};

/// How long another one may take to clear up a launch, or a child to execute its program.
const CLEARING: Duration = Duration::from_secs(30);

/// What is known of a clone before it exists.
#[derive(Debug, Clone, Copy)]
pub struct NewEntry<'a> {
    /// The template as it was asked for.
    pub name: &'a str,
    /// The template's digest.
    pub template: &'a str,
    /// The template's store.
    pub store: &'a StoreOfClone,
    /// What kind of process it will be.
    pub kind: Kind,
    /// Its number within its launch, from 0.
    pub index: u32,
    /// What a simulated clone is told to touch.
    pub touched: Option<Touched>,
    /// Where its disks are to be, unless in its own folder.
    pub disk_dir: Option<&'a Path>,
}

fn staging_prefix(launch: &str) -> String {
    format!(".{launch}-")
}

/// One call that makes clones, and holds them until all are ready.
#[derive(Debug)]
pub struct Launch {
    id: String,
    /// Locked shared, and inherited by every child until it executes its program: who takes the lock alone meets no
    /// process of this launch that cannot be told yet by what it was given.
    marker: OnceLock<fs::File>,
    baseline: Option<Baseline>,
    watchdog: Option<ProcessId>,
}

impl Launch {
    /// A launch of this process that has not begun.
    ///
    /// # Errors
    /// When the kernel does not say who this process is.
    pub fn prepare() -> Result<Launch> {
        // The name says whose it is, so that the marker is whole as soon as it exists.
        let me = ProcessId::me()?;
        let mut id = format!("{}.{}.{}", random_id()?, me.pid, me.identity);
        if let Some(namespace) = probe::pid_namespace() {
            id.push_str(&format!(".{namespace}"));
        }
        Ok(Launch { id, marker: OnceLock::new(), baseline: None, watchdog: None })
    }

    /// Begins: from now on the clones of this launch live and die with this process.
    ///
    /// # Errors
    /// When the runtime directory cannot be written.
    pub fn begin(&self) -> Result<()> {
        let all = runtime::create(LAUNCHES)?;
        places::expect_utf8("runtime directory", all.path())?;
        let make = || {
            let marker = all.create(&self.id, 0o600)?;
            flock(&marker, FlockOperation::LockShared)?;
            Ok(marker)
        };
        let marker =
            make().map_err(|e| runtime::failed("cannot begin a launch", &all.path_of(&self.id), e))?;
        self.marker.get_or_init(|| marker);
        Ok(())
    }

    /// Notes the host's free memory before its first clone.
    pub fn set_baseline(&mut self, baseline: Option<Baseline>) {
        self.baseline = baseline;
    }

    /// Notes the process that will note how its clones end.
    pub fn set_watchdog(&mut self, watchdog: ProcessId) {
        self.watchdog = Some(watchdog);
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
        let all = runtime::create(CLONES)?;
        let failed = |path: &Path, e| runtime::failed("cannot make the folder of a clone", path, e);
        // The folder appears with its record in it; what is cut off before bears the launch's name.
        let staged = format!("{}{}", staging_prefix(&self.id), new.index);
        let staging = all.path_of(&staged);
        all.create_folder(&staged, 0o700).map_err(|e| failed(&staging, e))?;
        let mut entry = Entry {
            id: String::new(),
            pid: 0,
            identity: 0,
            name: new.name.to_owned(),
            template: new.template.to_owned(),
            store: Some(new.store.clone()),
            kind: new.kind,
            dir: staging.clone(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            index: new.index,
            launch: self.id.clone(),
            baseline: self.baseline,
            touched: new.touched,
            ports: BTreeMap::new(),
            uuid: None,
            disks: BTreeSet::new(),
            disk_dir: new.disk_dir.map(Path::to_owned),
            pid_namespace: probe::pid_namespace(),
            watchdog: self.watchdog,
        };
        loop {
            entry.id = random_id()?;
            entry.dir.clone_from(&staging);
            entry.save()?;
            entry.dir = all.path_of(&entry.id);
            match all.rename(&staged, &all, &entry.id) {
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
        let failed = |e| runtime::failed("cannot let the clones go", Path::new(&self.id), e);
        let all = runtime::open(LAUNCHES)?.ok_or_else(|| failed(ErrorKind::NotFound.into()))?;
        all.remove_file(&self.id).map_err(failed)
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
    is_plain_name(launch) && runtime::runtime_dir().join(LAUNCHES).join(launch).symlink_metadata().is_ok()
}

/// Ends everything of one launch that was not let go; nothing, when it was. Gives what it removed.
///
/// # Errors
/// When a process does not die or a folder cannot be removed. What can be ended and removed is all the same, and the
/// launch is held on for the next one who tries.
pub fn abort(launch: &str) -> Result<Vec<Entry>> {
    let Some(launches) = runtime::open(LAUNCHES)?.filter(|_| is_plain_name(launch)) else {
        return Ok(vec![]);
    };
    let marker = launches.path_of(launch);
    let lock = match trusted_file(&launches, launch) {
        Ok(lock) => lock,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => {
            return Err(Error::failed("the marker of a launch cannot be used")
                .at(&marker)
                .because(e)
                .remedy("see what is there; if no `stencil clone` runs, remove it"));
        }
    };
    // The watchdog and another command may do it at one time, and a child may not have executed its program yet.
    match locks::wait(&lock, true, CLEARING, || false) {
        Ok(true) => {}
        Ok(false) => {
            let what = format!("a broken launch could not be cleared up within {} s", CLEARING.as_secs());
            let holders = users::list_pids(&locks::flock_holders(&lock));
            return Err(Error::try_again(what)
                .at(&marker)
                .remedy(format!("it is locked by {holders}: let that go on, or end it")));
        }
        Err(e) => return Err(Error::io("cannot lock", &marker, e)),
    }
    if !launches.has(launch) {
        return Ok(vec![]);
    }
    let all: Vec<Entry> = list()?.into_iter().filter(|e| e.launch == launch).collect();
    let mut problem = family::kill(&all).err();
    // The folder of one that does not die is still its guest's.
    let left = problem.is_some().then(|| Families::look(&all));
    let gone = |entry: &&Entry| left.as_ref().is_none_or(|left| left.of(entry).is_empty());
    for entry in all.iter().filter(gone) {
        problem = problem.or(entry.remove().err());
    }
    let prefix = staging_prefix(launch);
    for folder in fs::read_dir(clones_dir()).into_iter().flatten().flatten() {
        if folder.file_name().to_string_lossy().starts_with(&prefix) {
            problem = problem.or(remove_folder(&folder.path()).err());
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

/// The launcher, as the launch's name says; `None` for one that cannot be known here: of another PID namespace.
fn launcher(launch: &str) -> Option<ProcessId> {
    let mut words = launch.split('.').skip(1);
    let (pid, identity) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    // Versions before did not name it.
    let namespace: Option<u64> = words.next().map(str::parse).transpose().ok()?;
    let ours = namespace.is_none_or(|its| Some(its) == probe::pid_namespace());
    ours.then_some(ProcessId { pid, identity })
}

/// Ends what launchers left behind that died before all of their clones were ready.
///
/// # Errors
/// When the records cannot be read or something cannot be ended: the first of them. All others are cleared up all the same.
pub fn sweep() -> Result<()> {
    let mut problem = None;
    let Some(all) = runtime::open(LAUNCHES)? else { return Ok(()) };
    let names = all.names().map_err(|e| Error::io("cannot read the markers of launches", all.path(), e))?;
    for launch in names.iter().filter_map(|name| name.to_str()) {
        if launcher(launch).is_none_or(|launcher| launcher.is_alive()) {
            continue;
        }
        match abort(launch) {
            Ok(gone) => log::info!("launch {launch} had lost its launcher: {} clones removed", gone.len()),
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
    fn a_launch_says_whose_it_is() {
        let me = ProcessId::me().unwrap();
        let launch = Launch::prepare().unwrap();
        assert_eq!(launcher(launch.id()), Some(me));
        let (of_before, _) = launch.id().rsplit_once('.').unwrap();
        assert_eq!(launcher(of_before), Some(me));
        assert_eq!(launcher(&format!("{of_before}.1")), None);
        assert_eq!(launcher("c0000000"), None);
    }
}
