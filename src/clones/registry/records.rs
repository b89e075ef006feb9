//! Reads the records of clones.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use super::entry::Entry;
use super::entry::Kind;
use super::layout::{CLONES, RECORD, shared_name};
use super::shared_record;
use crate::control::runtime::{self, MAX_RECORD, is_plain_name, trusted_folder};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;

/// Returns all records, oldest first, including those of clones that have exited.
///
/// # Errors
/// Returns an error if the directory of clones cannot be read. A record that cannot be read is logged and skipped.
pub fn list() -> Result<Vec<Entry>> {
    let (entries, unread) = list_and_unread()?;
    unread.iter().for_each(|error| log::warn!("{error}"));
    Ok(entries)
}

/// Same as [`list`], with the errors of records that cannot be used instead of log lines. Each may belong to a living
/// clone.
///
/// # Errors
/// Returns an error if the directory of clones cannot be read.
pub fn list_and_unread() -> Result<(Vec<Entry>, Vec<Error>)> {
    let (mut entries, mut unread) = (vec![], vec![]);
    let Some(all) = runtime::open(CLONES)? else { return Ok((entries, unread)) };
    let names = all.names().map_err(|e| Error::io("cannot read the directory of clones", all.path(), e))?;
    for name in names.iter().filter(|name| !name.as_encoded_bytes().starts_with(b".")) {
        match load(&all, Path::new(name)) {
            Ok(found) => entries.extend(found),
            Err(error) => unread.push(error),
        }
    }
    entries.sort_by(|a, b| (a.created, a.index, &a.id).cmp(&(b.created, b.index, &b.id)));
    Ok((entries, unread))
}

/// Returns the record of the clone with this id.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if no clone has the id.
pub fn find(id: &str) -> Result<Entry> {
    let all = if is_plain_name(id) { runtime::open(CLONES)? } else { None };
    // The id of a simulated clone is the name of its directory, and its index.
    let name = id.split_once('-').map_or(id, |(name, _)| name);
    let found = all.map(|all| load(&all, Path::new(name))).transpose()?.unwrap_or_default();
    found.into_iter().find(|entry| entry.id == id).ok_or_else(|| {
        Error::not_found(format!("no clone has the id '{id}'")).hint("run 'stencil ps' to list the clones")
    })
}

/// Returns the records of the clones of one launch.
///
/// # Errors
/// Returns an error if a directory cannot be read, or if the record of a simulated launch cannot be used.
pub fn of_launch(launch: &str) -> Result<Vec<Entry>> {
    let Some(all) = runtime::open(CLONES)? else { return Ok(vec![]) };
    let mut found = load(&all, Path::new(shared_name(launch)))?;
    found.retain(|entry| entry.launch == launch);
    if found.is_empty() {
        found = list()?;
        found.retain(|entry| entry.launch == launch);
    }
    Ok(found)
}

/// Reads the record of a clone, or of the simulated clones of a launch, from a directory. Returns nothing for a
/// directory without a record.
fn load(all: &Directory, name: &Path) -> Result<Vec<Entry>> {
    let dir = all.path_of(name);
    let read = || -> io::Result<Vec<Entry>> {
        let directory = trusted_folder(all, name)?;
        let text = match runtime::read(&directory, RECORD, MAX_RECORD) {
            Err(e) if e.kind() == ErrorKind::NotFound => return shared_record::load(&directory),
            text => text?,
        };
        let mut entry: Entry = serde_json::from_slice(&text)?;
        // The directory where the record was found is removed later, not the one that the record names.
        entry.dir.clone_from(&dir);
        match entry.problem().or((entry.kind == Kind::Simulated).then_some("kind")) {
            None => Ok(vec![entry]),
            Some(field) => Err(io::Error::new(ErrorKind::InvalidData, format!("invalid {field}"))),
        }
    };
    match read() {
        // The clone is being removed.
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(vec![]),
        read => read.map_err(|e| {
            Error::failed("cannot use the record of a clone")
                .at(&dir)
                .because(e)
                .hint(format!("remove {} if no process of this clone is running", dir.display()))
        }),
    }
}

/// Waits for the watchdog processes of launches without a living clone, at most 2 s for each; `ended` are clones that
/// have exited. When such a watchdog has exited, the processes and files of its launch are gone.
pub fn wait_for_watchdogs(ended: &[Entry]) {
    const LIMIT: Duration = Duration::from_secs(2);
    let others = list().unwrap_or_default();
    let mut seen = HashSet::new();
    for entry in ended {
        let is_over = others.iter().all(|other| other.launch != entry.launch || !other.is_alive());
        if let Some(watchdog) = entry.watchdog.filter(|_| is_over)
            && seen.insert(watchdog)
        {
            // After the limit, a remaining watchdog has no effect on the user.
            let _ = watchdog.wait_for_exit(LIMIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::io::Write;

    use super::super::entry::{CloneStore, Touched};
    use super::super::layout::random_id;
    use super::*;
    use crate::sys::process::ProcessId;
    use crate::units::Bytes;

    #[test]
    fn reads_the_record_that_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let all = Directory::open(dir.path()).unwrap();
        let directory = all.create_folder("c0123456", 0o700).unwrap();
        let entry = Entry {
            id: "c0123456".into(),
            pid: 12,
            identity: 34,
            name: "web:v1".into(),
            template: "ab".repeat(32),
            store: CloneStore { path: "/s".into(), id: "12ab".into() },
            kind: Kind::Firecracker,
            dir: directory.path().to_owned(),
            created: 56,
            index: 7,
            launch: "c7654321".into(),
            baseline: None,
            touched: Some(Touched { read_pages: 8, written_pages: 9 }),
            labels: BTreeMap::from([("team".into(), "shop".into())]),
            ports: BTreeMap::from([("80".into(), 40_000)]),
            uuid: None,
            disks: BTreeSet::from(["root".into()]),
            disk_dir: Some("/var/tmp".into()),
            jail: Some("/srv/jailer/firecracker/c0123456".into()),
            jail_bytes: Bytes::new(11),
            pid_namespace: Some(10),
            watchdog: Some(ProcessId { pid: 7, identity: 8 }),
            ending: None,
        };
        assert!(entry.is_foreign() && entry.process().is_none() && entry.remove().is_err());
        let write = |text: &[u8]| runtime::replace(&directory, RECORD, text).unwrap();
        let load = || load(&all, Path::new("c0123456"));
        write(&serde_json::to_vec(&entry).unwrap());
        assert_eq!(load().unwrap(), std::slice::from_ref(&entry));
        let others: [fn(&mut Entry); 8] = [
            |e| e.id = "c7654321".into(),
            |e| e.pid = 1 << 23,
            |e| e.launch = "../mounts".into(),
            |e| e.disks = BTreeSet::from(["../../etc/x".into()]),
            |e| e.disk_dir = Some("tmp".into()),
            |e| e.disk_dir = Some("/var/../etc".into()),
            |e| e.template = "../x".into(),
            |e| e.uuid = Some("/etc".into()),
        ];
        for change in others {
            let mut bad = entry.clone();
            change(&mut bad);
            write(&serde_json::to_vec(&bad).unwrap());
            assert!(load().unwrap_err().to_string().contains("invalid "), "{bad:?}");
        }
        write(b"{");
        assert!(load().is_err());
        directory.remove_file(RECORD).unwrap();
        directory.create(RECORD, 0o666).unwrap().write_all(&serde_json::to_vec(&entry).unwrap()).unwrap();
        assert!(load().unwrap_err().to_string().contains("writable by other users"));
    }

    #[test]
    fn ids_are_neither_pids_nor_paths() {
        assert!(random_id().unwrap().parse::<u32>().is_err());
        assert!(find("../mounts").is_err());
        assert!(find("").is_err());
    }
}
