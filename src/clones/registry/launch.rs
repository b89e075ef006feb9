//! A launch: one call that makes clones, and holds them until all are ready.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use super::entry::{Entry, Kind, Touched, remove_folder};
use super::{clones_dir, launches_dir, list, random_id};
use crate::clones::family::{self, Families};
use crate::control::places;
use crate::error::{Error, Result};
use crate::sys::probe;
use crate::sys::process::ProcessId;

/// How long another one may take to clear up a launch, or a child to execute its program.
const CLEARING: Duration = Duration::from_secs(30);

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
        Ok(Launch { id, marker: OnceLock::new() })
    }

    /// Begins: from now on the clones of this launch live and die with this process.
    ///
    /// # Errors
    /// When the runtime directory cannot be written.
    pub fn begin(&self) -> Result<()> {
        let all = launches_dir();
        places::expect_utf8("runtime directory", &all)?;
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
            identity: 0,
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
            disks: BTreeSet::new(),
            disk_dir: new.disk_dir.map(Path::to_owned),
            pid_namespace: probe::pid_namespace(),
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
/// When a process does not die or a folder cannot be removed. What can be ended and removed is all the same, and the
/// launch is held on for the next one who tries.
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
    match fs::remove_file(&marker) {
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
    let Ok(markers) = fs::read_dir(launches_dir()) else { return Ok(()) };
    for marker in markers.flatten() {
        let Some(launch) = marker.file_name().to_str().map(str::to_owned) else { continue };
        if launcher(&launch).is_none_or(|launcher| launcher.is_alive()) {
            continue;
        }
        match abort(&launch) {
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
