//! `stencil density --by`: groups of clones of several users, cgroups, templates and labels add up to the whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{Parts, sum};
use crate::clones::accounting::{MIB, PAGE, number, world};
use crate::support::actor::{Actor, program};
use crate::support::host;
use crate::support::mount::{TestMount, run, wait_for};

/// A user whose name the host knows.
const USER: &str = "65534";
/// Pages that a process copies before it forks.
const FORKED: u64 = 1001;

/// A cgroup of the memory controller. Drop removes it when its processes have exited.
struct Cgroup {
    dir: PathBuf,
    name: String,
}

impl Cgroup {
    fn new() -> Cgroup {
        let name = format!("/stencil-test-density-{}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let root = if v1.join("cgroup.procs").exists() { v1 } else { Path::new("/sys/fs/cgroup") };
        let dir = root.join(&name[1..]);
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        Cgroup { dir, name }
    }

    fn add(&self, pid: u64) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..1000 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{} is not empty", self.dir.display());
    }
}

/// Clones of two templates, two users, two cgroups and two teams, and a template without clones.
struct Herd {
    world: TestMount,
    digests: [String; 3],
    child: u64,
    // Dropped in this order: the cgroup is empty when its process has exited.
    _actors: Vec<Actor>,
    cgroup: Cgroup,
}

impl Herd {
    fn new(serve: &str) -> Herd {
        let (world, web) = world(serve, 16 * MIB);
        let db = world.import_bytes(&[9; 1 << 20], "db:1");
        let idle = world.import_bytes(&[8; 1 << 20], "idle:1");
        fs::read(world.file(&idle, "memory")).unwrap();
        let launch = |tag: &str, count: &str, label: &str| {
            let simulate = "read=100p,write=30p";
            world.stencil(&["clone", tag, "-n", count, "--label", label, "--simulate", simulate]).ok();
        };
        launch("web:1", "3", "team=shop");
        launch("db:1", "2", "team=ads");
        let map = |actor: &mut Actor| {
            actor.tell(&format!("map 0 {} 0 {} rw", world.file(&web, "memory").display(), 16 * MIB));
        };
        let mut setpriv = Command::new("setpriv");
        setpriv.arg(format!("--reuid={USER}")).args(["--regid=65534", "--clear-groups"]).arg(program());
        let mut user = Actor::through(setpriv);
        map(&mut user);
        user.write_pages(0, 0..40);
        let mut parent = Actor::start();
        map(&mut parent);
        parent.write_pages(0, 0..FORKED);
        // The child shares the copies of its parent, apart from two that it writes.
        let child = parent.tell("fork 0 2000 2001");
        let cgroup = Cgroup::new();
        cgroup.add(child);
        let digests = [web, db, idle];
        Herd { world, digests, child, _actors: vec![user, parent], cgroup }
    }

    /// Returns the groups by name, after their sum was compared with the totals.
    fn groups(&self, by: &str) -> BTreeMap<String, Value> {
        let density = self.world.json(&["density", "--by", by]);
        let groups = density["groups"].as_array().unwrap();
        assert_eq!(sum(groups), sum([&density["totals"]]), "{by}: {density:#}");
        let of_all = |field: &str| groups.iter().map(|group| number(group, field)).sum::<u64>();
        for field in ["clones", "host_bytes", "swap_bytes"] {
            assert_eq!(of_all(field), number(&density["totals"], field), "{by}: {density:#}");
        }
        for group in groups {
            assert_eq!(number(group, "host_bytes"), sum([group]).values().sum::<u64>(), "{group:#}");
            assert_eq!(group["by"], by.split('=').next().unwrap());
        }
        groups
            .iter()
            .map(|group| (group["name"].as_str().unwrap_or("null").to_owned(), group.clone()))
            .collect()
    }
}

fn clones(groups: &BTreeMap<String, Value>) -> BTreeMap<&str, u64> {
    groups.iter().map(|(name, group)| (name.as_str(), number(group, "clones"))).collect()
}

#[test]
fn subtotals_by_each_property_add_up_to_the_byte() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let herd = Herd::new(serve);
        let [web, db, idle] = herd.digests.each_ref().map(|digest| digest[..12].to_owned());

        let templates = herd.groups("template");
        let expected = [(web.as_str(), 6), (db.as_str(), 2), (idle.as_str(), 0)];
        assert_eq!(clones(&templates), BTreeMap::from(expected), "{templates:#?}");
        assert_eq!(templates[&web]["tags"], json!(["web:1"]));
        assert_eq!(templates[&web]["digest"], herd.digests[0]);
        // The pages of a template are in its group, whatever maps them.
        let density = herd.world.json(&["density"]);
        for row in density["templates"].as_array().unwrap() {
            let group = &templates[&row["digest"].as_str().unwrap()[..12]];
            assert_eq!(group["template_bytes"], row["resident_bytes"], "{group:#}");
            let [each, count] = [group, row].map(|of| number(of, "clones"));
            assert_eq!(each, count);
            let own: u64 = ["private_bytes", "page_table_bytes", "overhead_bytes", "disk_bytes"]
                .map(|part| number(group, part))
                .iter()
                .sum();
            assert_eq!(row["bytes_per_further_clone"].as_u64(), own.checked_div(count), "{row:#}");
        }
        let idle_bytes = number(&templates[&idle], "host_bytes");
        assert!(
            idle_bytes >= MIB && idle_bytes == number(&templates[&idle], "template_bytes"),
            "{templates:#?}"
        );

        let name = run("id", &["-nu", USER]);
        let users = herd.groups("user");
        let expected = [("null", 0), (name.trim(), 1), ("root", 7)];
        assert_eq!(clones(&users), BTreeMap::from(expected), "{users:#?}");
        assert_eq!(users[name.trim()]["uid"], 65534);
        assert_eq!(number(&users[name.trim()], "private_bytes"), 40 * PAGE);
        // Six clones map the template.
        let web_bytes = number(&templates[&web], "template_bytes");
        let share = number(&users[name.trim()], "template_bytes");
        assert!((web_bytes / 6..=web_bytes / 6 + 1).contains(&share), "{share} of {web_bytes}");
        assert_eq!(number(&users["null"], "host_bytes"), idle_bytes, "pages of the template without clones");

        let cgroups = herd.groups("cgroup");
        assert_eq!(number(&cgroups[&herd.cgroup.name], "clones"), 1, "{cgroups:#?}");
        // The parent and the child each have half of the copies that both still map.
        let private = number(&cgroups[&herd.cgroup.name], "private_bytes");
        assert_eq!(private, FORKED * PAGE / 2 + 2 * PAGE, "process {}", herd.child);

        let teams = herd.groups("label=team");
        let expected = [("", 3), ("ads", 2), ("null", 0), ("shop", 3)];
        assert_eq!(clones(&teams), BTreeMap::from(expected), "{teams:#?}");
        assert_eq!(number(&teams["ads"], "private_bytes"), 2 * 30 * PAGE);
        let nobody = herd.groups("label=no-such-key");
        assert_eq!(clones(&nobody), BTreeMap::from([("", 8), ("null", 0)]));
        shown_as_a_table(&herd.world, &sum(teams.values()));
        labels_are_in_ps_and_density(&herd.world);
        herd.world.stencil(&["stop", "--all"]).ok();
    }
}

fn shown_as_a_table(world: &TestMount, whole: &Parts) {
    let text = world.stencil(&["density", "--by", "label=team"]).ok().out;
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    for name in ["ads", "shop", "(no label)", "(no clone)", "(all)"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "no {name} in {text}");
    }
    let private = stencilfs::units::Bytes::new(whole["private_bytes"]).to_string();
    let all = text.lines().find(|line| line.starts_with("(all)")).unwrap();
    assert!(all.contains(&private), "no {private} in {all}");
    let refused = world.stencil(&["density", "--by", "team"]).exits(2);
    assert!(refused.err.contains("label=KEY"), "{}", refused.err);
}

fn labels_are_in_ps_and_density(world: &TestMount) {
    for command in ["ps", "density"] {
        let listed = world.json(&[command]);
        let rows = listed["clones"].as_array().unwrap();
        let teams = rows.iter().filter(|row| row["labels"] == json!({"team": "shop"})).count();
        assert_eq!(teams, 3, "{listed:#}");
        assert!(rows.iter().all(|row| row["labels"].is_object()), "{listed:#}");
    }
}

#[test]
fn memory_without_clones_is_listed_apart() {
    let _host = host::shared();
    let (world, digest) = world("decode", MIB);
    fs::read(world.file(&digest, "memory")).unwrap();
    let density = wait_for("a measurement of the page cache", || {
        Some(world.json(&["density", "--by", "user"]))
            .filter(|density| density["totals"]["template_bytes"] == MIB)
    });
    let groups = density["groups"].as_array().unwrap();
    assert_eq!((groups.len(), &groups[0]["name"]), (1, &Value::Null), "{density:#}");
    assert_eq!(groups[0]["host_bytes"], density["totals"]["host_bytes"]);
    assert_eq!(density["headroom"]["further_clones"], Value::Null);
}
