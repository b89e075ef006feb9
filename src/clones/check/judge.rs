//! Judges the properties that depend on the mounts. A property that cannot be proven fails.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::facts::Facts;
use super::mappings::{bytes, huge_entries, not_copied, not_locked, private};
use super::properties::{Check, Finding, Property, of_error, other_template};
use crate::clones::accounting::Measured;
use crate::clones::find::{CloneProcess, Inodes, TemplateMapping};
use crate::clones::ranges::{intersect, joined};
use crate::control::{FileStatus, Mount, MountStatus, Served};
use crate::error::{Error, Result};
use crate::sanitize::path_text;
use crate::store::{Digest, FileKind, Serving, Template};
use crate::sys::memory::smaps::FlaggedMapping;
use crate::units::Bytes;

/// The status of a mount, or why there is none.
pub type Status = Result<MountStatus>;

/// Judges the properties of processes.
pub struct Judge<'a> {
    /// Mounts with a living process, in the order of `inodes`.
    pub mounts: &'a [Mount],
    /// Mounts without.
    pub dead: &'a [Mount],
    /// Devices of all Stencil mounts.
    pub devices: &'a HashSet<u64>,
    /// The files of `mounts`.
    pub inodes: &'a Inodes,
    /// The status of each mount that a process maps.
    pub statuses: &'a BTreeMap<usize, Status>,
    /// How files must be served; `None`: as their mount would serve them now.
    pub serving: Option<Served>,
}

impl Judge<'_> {
    /// Returns true if the process maps a file of a Stencil mount.
    pub fn maps_a_template(&self, facts: &Facts) -> bool {
        facts.measured.is_some() || self.unknown(facts).next().is_some()
    }

    /// Judges a process. `digest` is the template that it must map; `None` for that of its first mapping.
    pub fn of(&self, facts: &Facts, digest: Option<&Digest>) -> Vec<Check> {
        let mut checks = vec![Check::new(Property::Process, Ok("the process was inspected".to_owned()))];
        let Some((clone, measured)) = &facts.measured else {
            checks.push(Check::new(Property::Template, self.without_template(facts)));
            return checks;
        };
        let digest = digest.unwrap_or(&clone.maps[0].digest);
        for (property, finding) in [
            (Property::Template, self.template(facts, clone, measured, digest)),
            (Property::Mount, self.mount(clone)),
            (Property::Serving, self.serving(clone)),
            (Property::Private, private(facts, clone)),
            (Property::HugeEntries, huge_entries(facts, clone)),
            (Property::NotLocked, not_locked(facts, clone)),
            (Property::NotCopied, not_copied(facts, clone, measured)),
            (Property::Bytes, bytes(facts)),
        ] {
            checks.push(Check::new(property, finding));
        }
        checks
    }

    /// Returns the mappings of files of Stencil mounts that no readable template of these mounts has.
    fn unknown<'a>(&'a self, facts: &'a Facts) -> impl Iterator<Item = &'a FlaggedMapping> {
        let known = facts.measured.iter().flat_map(|(clone, _)| &clone.maps);
        let known: HashSet<u64> = known.map(|map| map.start).collect();
        let of_mount = facts.mappings.iter().filter(|mapping| self.devices.contains(&mapping.line.dev));
        of_mount.filter(move |mapping| !known.contains(&mapping.line.start))
    }

    fn without_template(&self, facts: &Facts) -> Finding {
        let Some(mapping) = self.unknown(facts).next() else {
            let remedy = "start the VMM with the memory file that 'stencil path T/FILE' prints";
            return Err(("the process maps no file of a mounted template".to_owned(), remedy.to_owned()));
        };
        let line = &mapping.line;
        if let Some(dead) = self.dead.iter().find(|dead| dead.device == line.dev) {
            return Err(of_error(&dead.lost_both(), "mount the store again"));
        }
        Err((
            format!("the process maps {}, which belongs to no readable template of a known mount", line.path),
            "run 'stencil verify', and this command with the STENCIL_RUNTIME_DIR of the mount".to_owned(),
        ))
    }

    fn template(&self, facts: &Facts, clone: &CloneProcess, measured: &Measured, digest: &Digest) -> Finding {
        if self.unknown(facts).next().is_some() {
            return self.without_template(facts);
        }
        if let Some(other) = clone.maps.iter().find(|map| map.digest != *digest) {
            return Err(other_template(&other.digest, digest));
        }
        // A stacking file system shows the inode number of a file after the file was replaced in an upper layer.
        if let Some(map) = clone.maps.iter().find(|map| map.dev != self.mounts[map.mount].device) {
            return Err((
                format!(
                    "'{}' is mapped through another file system, which may have replaced its bytes",
                    map.file
                ),
                format!("map the file in {}", path_text(&self.mounts[map.mount].mountpoint)),
            ));
        }
        if let Some(handler) = &facts.handler {
            return Err((handler.describe(), "use the File backend".to_owned()));
        }
        let template = self.open(&clone.maps[0]);
        let template =
            template.map_err(|error| of_error(&error, "run 'stencil verify' to check the store"))?;
        let mut whole = Vec::new();
        for (index, file) in template.files().iter().enumerate() {
            if file.kind != FileKind::Ram {
                continue;
            }
            let (name, size, mapped) =
                (&file.name, file.size, mapped(facts, clone, measured, index, file.size));
            if mapped < size {
                return Err((
                    format!("{mapped} of {size} of '{name}' are mapped; the process does not map the rest"),
                    format!("map the whole file '{name}'"),
                ));
            }
            whole.push(format!("'{name}' ({size})"));
        }
        let template = digest.short();
        Ok(match whole.is_empty() {
            true => format!("maps files of template {template}, which has no memory file"),
            false => format!("all of {} of template {template} is mapped", whole.join(", ")),
        })
    }

    fn open(&self, map: &TemplateMapping) -> Result<Template> {
        let store = self.inodes.store(map.mount);
        store.ok_or_else(|| Error::failed("the store of the mount is unknown"))?.template(&map.digest)
    }

    fn mount(&self, clone: &CloneProcess) -> Finding {
        let used: BTreeSet<usize> = clone.maps.iter().map(|map| map.mount).collect();
        for mount in &used {
            self.status(*mount).map_err(|error| match error {
                Some(error) => of_error(error, "run 'stencil status'"),
                None => {
                    ("the status of the mount is unknown".to_owned(), "run this command again".to_owned())
                }
            })?;
        }
        let places: Vec<String> =
            used.iter().map(|mount| path_text(&self.mounts[*mount].mountpoint).to_string()).collect();
        Ok(format!("the supervisor of {} responds", places.join(", ")))
    }

    fn status(&self, mount: usize) -> Result<&MountStatus, Option<&Error>> {
        self.statuses.get(&mount).map_or(Err(None), |status| status.as_ref().map_err(Some))
    }

    fn serving(&self, clone: &CloneProcess) -> Finding {
        let mut found: BTreeMap<&str, Served> = BTreeMap::new();
        for map in &clone.maps {
            let file =
                self.status(map.mount).ok().and_then(|status| file_of(status, map)).ok_or_else(|| {
                    (
                        format!("the status of the mount does not list '{}'", map.file),
                        "run 'stencil status' to see the mount and its templates".to_owned(),
                    )
                })?;
            let Some(served) = served(map, file) else {
                let why = file.why.as_deref().unwrap_or("the mount has no complete backing of the file");
                return Err((
                    format!("the backing of '{}' is not served any more: {why}", map.file),
                    "launch the clone again".to_owned(),
                ));
            };
            let expected = self.serving.unwrap_or(file.serving);
            if served != expected {
                let why = file.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
                let remedy = match file.serving == expected {
                    true => "launch the clone again: a mapping keeps the way in which its file was opened",
                    false => {
                        "mount the store with the --serve option for the expected way, and see 'stencil status'"
                    }
                };
                let (name, expected) = (served.name(), expected.name());
                return Err((
                    format!("'{}' is served by {name}, expected {expected}{why}", map.file),
                    remedy.to_owned(),
                ));
            }
            found.insert(&map.file, served);
        }
        let each = found.iter().map(|(file, served)| format!("'{file}' is served by {}", served.name()));
        Ok(each.collect::<Vec<_>>().join(", "))
    }
}

fn file_of<'a>(status: &'a MountStatus, map: &TemplateMapping) -> Option<&'a FileStatus> {
    let template = status.templates.iter().find(|template| template.digest == map.digest)?;
    template.files.iter().find(|file| file.name == map.file)
}

/// Returns how a mapping is served, `None` for a mapping of a backing that the mount does not serve now.
fn served(map: &TemplateMapping, file: &FileStatus) -> Option<Served> {
    match map.serving {
        Serving::Decode => Some(Served::Decode),
        Serving::Passthrough if file.hydrated && file.serving != Served::Decode => Some(file.serving),
        Serving::Passthrough => None,
    }
}

/// Returns how much of a file with this size is mapped, with zero memory and plain anonymous memory in its place.
fn mapped(facts: &Facts, clone: &CloneProcess, measured: &Measured, index: usize, size: Bytes) -> Bytes {
    let parts = clone.maps.iter().filter(|map| map.index == index);
    let mut ranges: Vec<_> =
        parts.map(|map| map.offset.get()..map.offset.get().saturating_add(map.length.get())).collect();
    for (replaced, _) in &measured.replaced {
        let map = &clone.maps[replaced.map];
        if map.index == index {
            let offset = |address: u64| address.wrapping_sub(map.distance());
            let memory = facts.unnamed_memory(&replaced.range);
            ranges.extend(memory.map(|part| offset(part.start)..offset(part.end)));
        }
    }
    let inside = intersect(&joined(ranges), std::slice::from_ref(&(0..size.get())));
    inside.iter().map(|range| Bytes::new(range.end - range.start)).sum()
}
