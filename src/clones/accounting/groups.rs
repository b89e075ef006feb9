//! Subtotals of groups of clones. They add up to the whole, in every part.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use nix::unistd::{Uid, User};
use serde::Serialize;

use super::shares::{Parts, Shares};
use super::survey::{CloneRow, Density, Survey};
use crate::error::{Error, Result};
use crate::store::Digest;
use crate::units::Bytes;

/// The property by which clones are grouped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// The template of the first mapping.
    Template,
    /// The real user id.
    User,
    /// The control group.
    Cgroup,
    /// The value of the label with this key.
    Label(String),
}

impl By {
    /// Returns the name of the property.
    pub fn name(&self) -> &'static str {
        match self {
            By::Template => "template",
            By::User => "user",
            By::Cgroup => "cgroup",
            By::Label(_) => "label",
        }
    }
}

impl FromStr for By {
    type Err = Error;

    fn from_str(text: &str) -> Result<By> {
        match text.split_once('=') {
            None if text == "template" => Ok(By::Template),
            None if text == "user" => Ok(By::User),
            None if text == "cgroup" => Ok(By::Cgroup),
            Some(("label", key)) if !key.is_empty() => Ok(By::Label(key.to_owned())),
            _ => Err(Error::usage(format!("invalid group '{text}'"))
                .hint("use template, user, cgroup, or label=KEY for the values of a label")),
        }
    }
}

/// The memory of some clones.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// The property that these clones have in common.
    pub by: &'static str,
    /// Name of the user, control group, value of the label, or short digest of the template; empty for clones without the
    /// label, and null for memory that no clone uses.
    pub name: Option<String>,
    /// User id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Digest of the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Tags of the template.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<String>,
    /// Number of clones.
    pub clones: u64,
    /// The shares of these clones.
    #[serde(flatten)]
    pub parts: Parts,
    /// Sum of all parts.
    pub host_bytes: Bytes,
    /// Copied template pages, and memory of replaced pages, in swap. They take no RAM.
    pub swap_bytes: Bytes,
}

/// What the clones of a group have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Template(Digest),
    User(u32),
    Text(String),
    Unused,
}

impl Key {
    fn of(clone: &CloneRow, by: &By) -> Key {
        match by {
            By::Template => Key::Template(clone.digest),
            By::User => Key::User(clone.uid),
            By::Cgroup => Key::Text(clone.cgroup.clone()),
            By::Label(key) => Key::Text(clone.labels.get(key).cloned().unwrap_or_default()),
        }
    }

    fn group(self, by: &By, density: &Density, sum: Sum) -> Group {
        let row = |digest: Digest| density.templates.iter().find(|row| row.digest == digest);
        let (mut uid, mut digest, mut tags) = (None, None, BTreeSet::new());
        let name = match self {
            Key::Template(its) => {
                digest = Some(its);
                tags = row(its).map(|row| row.tags.clone()).unwrap_or_default();
                Some(its.short())
            }
            Key::User(its) => {
                uid = Some(its);
                Some(user_name(its))
            }
            Key::Text(text) => Some(text),
            Key::Unused => None,
        };
        let Sum { clones, parts, swap_bytes } = sum;
        Group {
            by: by.name(),
            name,
            uid,
            digest,
            tags,
            clones,
            parts,
            host_bytes: parts.host_bytes(),
            swap_bytes,
        }
    }
}

/// Returns the name of a user from the sources of nsswitch.conf(5), or the number of a user without a name.
fn user_name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    clones: u64,
    parts: Parts,
    swap_bytes: Bytes,
}

/// Returns the groups, the largest one first. Memory that no clone uses is a group without a name.
pub fn groups(survey: &Survey, by: &By) -> Vec<Group> {
    let sums = sums(&survey.density, &survey.shares, by);
    let of = |(key, sum): (Key, Sum)| key.group(by, &survey.density, sum);
    let mut groups: Vec<Group> = sums.into_iter().map(of).collect();
    // The sort is stable: equal groups stay in the order of their keys.
    groups.sort_by_key(|group| std::cmp::Reverse(group.host_bytes));
    groups
}

fn sums(density: &Density, shares: &Shares, by: &By) -> BTreeMap<Key, Sum> {
    let mut sums: BTreeMap<Key, Sum> = BTreeMap::new();
    sums.entry(Key::Unused).or_default().parts += shares.unused;
    for (clone, share) in density.clones.iter().zip(&shares.clones) {
        let sum = sums.entry(Key::of(clone, by)).or_default();
        sum.clones += 1;
        sum.parts += *share;
        sum.swap_bytes += clone.memory.swap_bytes;
    }
    if *by == By::Template {
        // The pages of a template belong to its group, whatever maps them.
        sums.values_mut().for_each(|sum| sum.parts.template_bytes = Bytes::ZERO);
        for row in &density.templates {
            sums.entry(Key::Template(row.digest)).or_default().parts.template_bytes += row.resident_bytes;
        }
    }
    sums.retain(|key, sum| *key != Key::Unused || sum.parts.host_bytes() > Bytes::ZERO);
    sums
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::clones::accounting::frames::{Counted, Distinct, Frames, distinct};
    use crate::clones::accounting::process::CloneMemory;
    use crate::clones::accounting::shares::TemplatePages;
    use crate::clones::accounting::templates::TemplateMemory;
    use crate::clones::accounting::totals::Totals;
    use crate::units::{PAGE_SIZE, PageCount};

    #[derive(Debug, Clone)]
    struct Sample {
        /// Exclusive pages and shared frames: copied, and outside the template mappings.
        frames: [(u64, Vec<u64>); 2],
        tables: u64,
        disks: u64,
        swap: u64,
        template: u8,
        also: Option<u8>,
        uid: u32,
        label: Option<u8>,
    }

    fn sample() -> impl Strategy<Value = Sample> {
        let frames = || (0u64..50, prop::collection::vec(0u64..30, 0..20));
        let sizes = (0u64..9_000, 0u64..9_000, 0u64..9_000);
        let keys = (0u8..5, prop::option::of(0u8..5), 0u32..4, prop::option::of(0u8..3));
        ([frames(), frames()], sizes, keys).prop_map(
            |(frames, (tables, disks, swap), (template, also, uid, label))| Sample {
                frames,
                tables,
                disks,
                swap,
                template,
                also,
                uid,
                label,
            },
        )
    }

    fn digest(number: u8) -> Digest {
        Digest::new([number; 32])
    }

    fn row(clone: &Sample) -> CloneRow {
        CloneRow {
            id: String::new(),
            pid: 1,
            pids: vec![1],
            reference: None,
            command: String::new(),
            cgroup: format!("/{}", clone.uid % 3),
            uid: clone.uid,
            digest: digest(clone.template),
            kind: "other".to_owned(),
            labels: clone.label.map(|label| ("team".to_owned(), label.to_string())).into_iter().collect(),
            memory: CloneMemory { swap_bytes: Bytes::new(clone.swap), ..CloneMemory::default() },
            maps: vec![],
        }
    }

    fn template(number: u8, resident: u64) -> TemplateMemory {
        TemplateMemory {
            digest: digest(number),
            tags: BTreeSet::new(),
            serving: String::new(),
            size_bytes: Bytes::ZERO,
            data_bytes: Bytes::ZERO,
            resident_bytes: Bytes::new(resident),
            resident_zero_bytes: Bytes::ZERO,
            store_cache_bytes: Bytes::ZERO,
            clones: 0,
            bytes_per_further_clone: None,
        }
    }

    /// What the host has: each frame once, a frame that is a copied page anywhere as a copied page.
    fn whole(clones: &[Sample], resident: &[u64], store_cache_bytes: Bytes) -> Parts {
        let set = |part: usize| clones.iter().flat_map(|clone| &clone.frames[part].1).collect::<HashSet<_>>();
        let pages = |part: usize, shared: usize| {
            let exclusive: u64 = clones.iter().map(|clone| clone.frames[part].0).sum();
            Bytes::new((exclusive + shared as u64) * PAGE_SIZE)
        };
        let sum = |part: fn(&Sample) -> u64| Bytes::new(clones.iter().map(part).sum());
        Parts {
            template_bytes: Bytes::new(resident.iter().sum()),
            store_cache_bytes,
            private_bytes: pages(0, set(0).len()),
            page_table_bytes: sum(|clone| clone.tables),
            overhead_bytes: pages(1, set(1).difference(&set(0)).count()),
            disk_bytes: sum(|clone| clone.disks),
        }
    }

    proptest! {
        #[test]
        fn groups_add_up_to_the_whole_in_every_part(
            clones in prop::collection::vec(sample(), 0..20),
            resident in prop::collection::vec(0u64..1_000_000, 5),
            cache in 0u64..100_000,
        ) {
            let store_cache = Bytes::new(cache);
            let counted = |(pages, frames): &(u64, Vec<u64>)| Counted::of(PageCount::new(*pages), frames.clone());
            let frames = |clone: &Sample| Frames { private: counted(&clone.frames[0]), overhead: counted(&clone.frames[1]) };
            let frames: Vec<Frames> = clones.iter().map(frames).collect();
            let own = |(Distinct { private, overhead }, clone): (Distinct, &Sample)| Parts {
                private_bytes: private,
                overhead_bytes: overhead,
                page_table_bytes: Bytes::new(clone.tables),
                disk_bytes: Bytes::new(clone.disks),
                ..Parts::default()
            };
            let own: Vec<Parts> = distinct(frames.iter()).into_iter().zip(&clones).map(own).collect();
            let pages: Vec<TemplatePages> = (0u8..).zip(&resident).map(|(number, resident)| {
                let maps = |index: &usize| clones[*index].template == number || clones[*index].also == Some(number);
                TemplatePages { resident: Bytes::new(*resident), users: (0..clones.len()).filter(maps).collect() }
            }).collect();
            let shares = Shares::new(own, &pages, store_cache);
            let whole = whole(&clones, &resident, store_cache);
            prop_assert_eq!(shares.total(), whole);
            let density = Density {
                templates: (0u8..).zip(&resident).map(|(number, resident)| template(number, *resident)).collect(),
                clones: clones.iter().map(row).collect(),
                totals: Totals::default(),
                handlers: vec![],
                dead_mounts: vec![],
            };
            for by in [By::Template, By::User, By::Cgroup, By::Label("team".to_owned())] {
                let sums = sums(&density, &shares, &by);
                let mut all = Sum::default();
                for sum in sums.values() {
                    all.parts += sum.parts;
                    all.clones += sum.clones;
                    all.swap_bytes += sum.swap_bytes;
                }
                prop_assert_eq!(all.parts, whole);
                prop_assert_eq!(all.clones, clones.len() as u64);
                prop_assert_eq!(all.swap_bytes, Bytes::new(clones.iter().map(|clone| clone.swap).sum()));
            }
        }
    }

    #[test]
    fn equal_parts_differ_by_at_most_one_byte() {
        let counted = |frames: &[u64]| Counted::of(PageCount::ZERO, frames.to_vec());
        let frames = |own: &[u64]| Frames { private: counted(own), overhead: counted(&[]) };
        // A clone that has a frame twice, by KSM, takes one share of the frame.
        let frames = [frames(&[7, 7]), frames(&[7]), frames(&[7])];
        let bytes: Vec<u64> = distinct(frames.iter()).iter().map(|ram| ram.private.get()).collect();
        assert_eq!(bytes, [1366, 1365, 1365]);
    }

    #[test]
    fn an_unknown_property_is_refused_with_the_known_ones() {
        for (text, by) in [("user", By::User), ("label=a=b", By::Label("a=b".to_owned()))] {
            assert_eq!(text.parse::<By>().unwrap(), by);
        }
        for text in ["label", "label=", "users", "", "user=root"] {
            let error = text.parse::<By>().unwrap_err();
            assert!(error.hint_text().is_some_and(|hint| hint.contains("label=KEY")), "{text}");
        }
    }
}
