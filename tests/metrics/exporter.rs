//! `stencil exporter`: its figures and its replies. It leaves no process, file or descriptor behind.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::Signal;
use serde_json::Value;
use stencilfs::sys::process::ProcessId;

use crate::clones::accounting::{number, world};
use crate::support::actor::Actor;
use crate::support::daemon::drill;
use crate::support::exporter::{Exporter, OPEN_METRICS, Samples, promtool, samples};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};

/// The parts of the memory, with their fields in `density --json`.
const PARTS: [(&str, &str); 6] = [
    ("template", "template_bytes"),
    ("store_cache", "store_cache_bytes"),
    ("private", "private_bytes"),
    ("page_table", "page_table_bytes"),
    ("overhead", "overhead_bytes"),
    ("disk", "disk_bytes"),
];

fn sum(density: &Value, digest: &str, field: &str) -> u64 {
    let clones = density["clones"].as_array().unwrap();
    clones.iter().filter(|clone| clone["digest"] == digest).map(|clone| number(clone, field)).sum()
}

/// Returns the metrics that `density` implies.
fn expected(density: &Value, per_clone: usize) -> Samples {
    let mut all = Samples::new();
    let mut add = |name: String, value: u64| assert_eq!(all.insert(name, value as f64), None);
    let totals = &density["totals"];
    for (part, field) in PARTS {
        add(format!("stencil_memory_bytes{{part=\"{part}\"}}"), number(totals, field));
    }
    for (metric, field) in [
        ("stencil_clones", "clones"),
        ("stencil_memory_mapped_bytes", "mapped_bytes"),
        ("stencil_memory_unshared_bytes", "copied_bytes"),
        ("stencil_memory_swap_bytes", "swap_bytes"),
        ("stencil_memory_per_further_clone_bytes", "bytes_per_further_clone"),
    ] {
        add(metric.to_owned(), number(totals, field));
    }
    for template in density["templates"].as_array().unwrap() {
        let digest = template["digest"].as_str().unwrap();
        for (metric, field) in [
            ("size_bytes", "size_bytes"),
            ("data_bytes", "data_bytes"),
            ("resident_bytes", "resident_bytes"),
            ("store_cache_bytes", "store_cache_bytes"),
            ("clones", "clones"),
        ] {
            add(format!("stencil_template_{metric}{{template=\"{digest}\"}}"), number(template, field));
        }
        for field in [
            "private_bytes",
            "swap_bytes",
            "dirty_pages",
            "page_table_bytes",
            "overhead_bytes",
            "disk_bytes",
            "mapped_bytes",
            "mapped_clean_bytes",
            "pmd_mapped_bytes",
        ] {
            let value = sum(density, digest, field);
            add(format!("stencil_template_clones_{field}{{template=\"{digest}\"}}"), value);
        }
        let tags: Vec<&str> =
            template["tags"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        let (tags, serving) = (tags.join(","), template["serving"].as_str().unwrap());
        add(
            format!("stencil_template_info{{template=\"{digest}\",tags=\"{tags}\",serving=\"{serving}\"}}"),
            1,
        );
    }
    let mut clones: Vec<&Value> = density["clones"].as_array().unwrap().iter().collect();
    clones.sort_by_key(|clone| std::cmp::Reverse(number(clone, "private_bytes")));
    for clone in &clones[..per_clone] {
        let text = |field: &str| clone[field].as_str().unwrap();
        let labels =
            format!("clone=\"{}\",pid=\"{}\",template=\"{}\"", text("id"), clone["pid"], text("digest"));
        for field in ["private_bytes", "swap_bytes", "page_table_bytes", "overhead_bytes"] {
            add(format!("stencil_clone_{field}{{{labels}}}"), number(clone, field));
        }
    }
    all
}

/// The metrics about clones and templates.
fn about_clones(all: Samples) -> Samples {
    let prefixes = ["stencil_clone", "stencil_memory", "stencil_template"];
    all.into_iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix))).collect()
}

#[test]
fn figures_are_those_of_density_to_the_byte() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let (world, digest) = world(serve, 8 << 20);
        world.import_bytes(&[9; 1 << 20], "db:1");
        world.stencil(&["clone", "web:1", "-n", "3", "--simulate", "read=400p,write=60p"]).ok();
        world.stencil(&["clone", "web:1", "-n", "4", "--simulate", "read=100p,write=9p"]).ok();
        for pid in world.json(&["ps"])["clones"].as_array().unwrap().iter().map(|clone| number(clone, "pid"))
        {
            drill::stop(ProcessId::of(pid as u32).unwrap().unwrap());
        }
        let exporter = Exporter::start(&world, &["--max-age", "0", "--per-clone", "3"]);
        // The page cache of the store and the memory of its processes may change meanwhile.
        let (found, wanted) = wait_for("a measurement during which nothing changes", || {
            let before = world.json(&["density"]);
            let collected = |s: &Samples| s["stencil_exporter_collections_total{collector=\"clones\"}"];
            let earlier = collected(&exporter.samples());
            let found = exporter.samples();
            let recent = found.contains_key("stencil_clones") && collected(&found) > earlier;
            (recent && before == world.json(&["density"])).then_some((about_clones(found), before))
        });
        let host = number(&wanted["totals"], "host_bytes");
        let wanted = expected(&wanted, 3);
        assert!(found == wanted, "{found:#?}\n{wanted:#?}");
        assert_eq!(found[&format!("stencil_template_clones{{template=\"{digest}\"}}")], 7.0);
        let parts = found.iter().filter(|(name, _)| name.starts_with("stencil_memory_bytes{"));
        assert_eq!(parts.map(|(_, value)| *value as u64).sum::<u64>(), host);
    }
}

/// The names of all metrics in the reference.
pub fn documented() -> Vec<String> {
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/metrics.md")).unwrap();
    let names = page.lines().filter_map(|line| line.strip_prefix("| `stencil_")?.split('`').next());
    names.map(|name| format!("stencil_{name}")).collect()
}

#[test]
fn both_forms_have_the_documented_metrics_and_those_of_the_server() {
    let _host = host::shared();
    let (world, digest) = world("decode", 4 << 20);
    let mut actor = Actor::start();
    actor.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 4 << 20));
    actor.read_pages(0, (0..1024).step_by(64));
    actor.write_pages(0, [5]);
    let exporter = Exporter::start(&world, &["--max-age", "0", "--per-clone", "10"]);
    wait_for("figures", || exporter.samples().contains_key("stencil_clones").then_some(()));
    let text = exporter.scrape("text/plain");
    assert!(text.head.contains("\r\nContent-Type: text/plain; version=0.0.4"), "{}", text.head);
    let found = promtool(&["check", "metrics"], &text.body);
    assert_eq!(found, "", "promtool has advice");
    let open = exporter.scrape(OPEN_METRICS);
    assert!(
        open.head.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0"),
        "{}",
        open.head
    );
    assert!(open.body.ends_with("\n# EOF\n") && open.body.contains("# UNIT stencil_memory_bytes bytes\n"));

    let names = |body: &str| -> Vec<String> {
        let line = |line: &str| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned());
        body.lines().filter_map(line).collect()
    };
    assert_eq!(names(&text.body), documented(), "docs/reference/metrics.md");
    let bare = |name: &String| name.trim_end_matches("_total").trim_end_matches("_info").to_owned();
    assert_eq!(names(&open.body), documented().iter().map(bare).collect::<Vec<_>>());
    // The forms write the bounds of buckets differently: 0.00005 and 5e-05.
    let same = |body: &str| -> Vec<String> {
        samples(body).into_keys().filter(|name| !name.contains("_bucket{")).collect()
    };
    assert!(same(&text.body) == same(&open.body), "{}\n{}", text.body, open.body);

    // A collection opens files of the mount, but reads none.
    let mount = format!("mount=\"{}\"", world.mountpoint().display());
    let before = world.status();
    let earlier = exporter.samples()["stencil_exporter_collections_total{collector=\"mounts\"}"];
    let found = wait_for("another collection", || {
        let collections = |all: &Samples| all["stencil_exporter_collections_total{collector=\"mounts\"}"];
        Some(exporter.samples()).filter(|all| collections(all) > earlier + 1.0)
    });
    let after = world.status();
    let assert_between = |metric: &str, of: &dyn Fn(&Value) -> u64| {
        let (least, most) = (of(&before), of(&after));
        let value = found[&format!("stencil_server_{metric}")] as u64;
        assert!((least..=most).contains(&value) && least > 0, "{metric}: {value} in {least}..={most}");
    };
    for (metric, name, label) in [
        ("reads_total", "reads", ""),
        ("read_bytes_total", "read_bytes", ""),
        ("requests_total", "answers", ""),
        ("opens_total", "opens_decode", ",serving=\"decode\""),
        ("blocks_total", "blocks_decoded", ",source=\"decoded\""),
    ] {
        let metric = format!("{metric}{{{mount}{label}}}");
        assert_between(&metric, &|status| number(&status["counters"], name));
    }
    assert_eq!(number(&before["counters"], "reads"), number(&after["counters"], "reads"));
    for operation in ["read", "open"] {
        let count = |status: &Value| {
            let counts = status["latencies"][operation]["counts"].as_array().unwrap();
            counts.iter().map(|count| count.as_u64().unwrap()).sum()
        };
        let prefix = format!("{operation}_duration_seconds");
        assert_between(&format!("{prefix}_count{{{mount}}}"), &count);
        assert_between(&format!("{prefix}_bucket{{{mount},le=\"+Inf\"}}"), &count);
        assert!(found[&format!("stencil_server_{prefix}_sum{{{mount}}}")] > 0.0);
        // READs of the manifest are in the histogram, and not among the reads.
        let counter = if operation == "read" { "reads" } else { "opens_decode" };
        assert!(count(&before) >= number(&before["counters"], counter), "{before:#}");
    }
    assert_eq!(found[&format!("stencil_mount_up{{{mount}}}")], 1.0);
    wait_for("replies to all requests", || {
        (exporter.samples()[&format!("stencil_mount_pending_requests{{{mount}}}")] == 0.0).then_some(())
    });
    world.kill_server();
    wait_for("another server", || (world.status()["restarts"] == 1).then_some(()));
    wait_for("the restart in the metrics", || {
        (exporter.samples()[&format!("stencil_server_restarts_total{{{mount}}}")] == 1.0).then_some(())
    });
}

#[test]
fn a_stopped_supervisor_and_a_dead_mount_delay_no_scrape() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let exporter = Exporter::start(&world, &["--max-age", "0"]);
    let up = format!("stencil_mount_up{{mount=\"{}\"}}", world.mountpoint().display());
    let scrape = || exporter.samples().get(&up).copied();
    wait_for("the mount", || (scrape() == Some(1.0)).then_some(()));
    let status = world.status();
    let supervisor = ProcessId::of(number(&status, "supervisor_pid") as u32).unwrap().unwrap();
    drill::stop(supervisor);
    wait_for("a supervisor that does not answer", || (scrape() == Some(0.0)).then_some(()));
    host::measured(|| exporter.scrape("").within(Duration::from_secs(1)));
    supervisor.signal(Signal::CONT).unwrap();
    wait_for("its answer", || (scrape() == Some(1.0)).then_some(()));
    let server = ProcessId::of(world.server()).unwrap().unwrap();
    supervisor.signal(Signal::KILL).unwrap();
    server.signal(Signal::KILL).unwrap();
    wait_for("a dead mount", || (scrape() == Some(0.0)).then_some(()));
}

#[test]
fn a_killed_exporter_leaves_no_collecting_process() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mut exporter = Exporter::start(&world, &["--max-age", "0"]);
    let supervisor = ProcessId::of(number(&world.status(), "supervisor_pid") as u32).unwrap().unwrap();
    drill::stop(supervisor);
    let collecting = wait_for("a collection that waits for the supervisor", || {
        exporter.scrape("");
        let tasks = fs::read_dir(format!("/proc/{}/task", exporter.pid())).unwrap();
        let children =
            tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok());
        let children: Vec<u32> = children
            .flat_map(|pids| pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
            .collect();
        let waits = |pid: &&u32| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.contains("--collect\0mounts\0")
        };
        ProcessId::of(*children.iter().find(waits)?).unwrap()
    });
    // A collection that is stopped ends by a signal only.
    drill::stop(collecting);
    assert_eq!(exporter.end(Signal::KILL), None);
    let mut ended = false;
    for _ in 0..1000 {
        ended = !collecting.is_alive();
        if ended {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = collecting.signal(Signal::KILL);
    supervisor.signal(Signal::CONT).unwrap();
    assert!(ended, "process {} is left", collecting.pid);
}

/// A directory that a bind mount covers. Drop unmounts it.
struct Covered(PathBuf);

impl Covered {
    fn by(source: &Path, dir: PathBuf) -> Covered {
        mount_bind(source, &dir).unwrap();
        Covered(dir)
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn an_unreadable_store_or_record_hides_no_supervisor() {
    let _host = host::shared();
    let (world, _) = world("decode", 1 << 20);
    let exporter = Exporter::of_all_stores(&world, &["--max-age", "0"]);
    let mount = format!("mount=\"{}\"", world.mountpoint().display());
    let (up, templates) = (
        format!("stencil_mount_up{{{mount}}}"),
        format!("stencil_mount_templates{{{mount},serving=\"decode\"}}"),
    );
    let wait = |what: &str, seen: &dyn Fn(&Samples) -> bool| {
        wait_for(what, || Some(exporter.samples()).filter(seen))
    };
    wait("the template", &|all| all.get(&templates) == Some(&1.0));
    let moved = world.dir().join("moved");
    fs::rename(world.store_dir(), &moved).unwrap();
    let found = wait("a store that cannot be read", &|all| !all.contains_key(&templates));
    assert_eq!(found[&up], 1.0);
    // A store in a file system that does not answer.
    let other = TestMount::with(&["--serve", "decode", "--watchdog", "0"]);
    let server = ProcessId::of(other.server()).unwrap().unwrap();
    fs::create_dir(world.store_dir()).unwrap();
    let covered = Covered::by(other.mountpoint(), world.store_dir());
    drill::stop(server);
    let duration = "stencil_exporter_collection_duration_seconds{collector=\"mounts\"}";
    let found = wait("a store that does not answer", &|all| all[duration] >= 4.0);
    assert!(found[&up] == 1.0 && !found.contains_key(&templates), "{found:#?}");
    server.signal(Signal::CONT).unwrap();
    drop(covered);
    fs::remove_dir(world.store_dir()).unwrap();
    fs::rename(&moved, world.store_dir()).unwrap();
    wait("the template again", &|all| all.get(&templates) == Some(&1.0));

    let record = world.runtime_dir().join("mounts/1-1");
    fs::DirBuilder::new().mode(0o700).create(&record).unwrap();
    fs::write(record.join("mount.json"), "{}").unwrap();
    let blocked = "stencil_exporter_blocked{collector=\"clones\"}";
    let found =
        wait("an unreadable record", &|all| all["stencil_unreadable_records"] == 1.0 && all[blocked] == 1.0);
    assert_eq!(found[&up], 1.0);
    fs::remove_dir_all(&record).unwrap();
    wait("recent figures", &|all| all["stencil_unreadable_records"] == 0.0 && all[blocked] == 0.0);
}

#[test]
fn a_socket_is_removed_at_the_end_and_requests_are_limited() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let path = world.dir().join("exporter.sock");
    let address = format!("unix:{}", path.display());
    let mut exporter = Exporter::at(&world, &address, &[]);
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket() && metadata.permissions().mode() & 0o7777 == 0o660);
    let taken = world.stencil(&["exporter", "--listen", &address]).exits(5);
    assert!(taken.err.contains("another process listens on the socket"), "{}", taken.err);
    let index = exporter.ask("GET / HTTP/1.1\r\n\r\n");
    assert_eq!((index.status, index.body.lines().count()), (200, 1));
    for (request, status) in [
        ("GET /metricsx HTTP/1.1\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\n\r\n", 405),
        ("GET /metrics\r\n\r\n", 400),
    ] {
        assert_eq!(exporter.ask(request).status, status, "{request}");
    }
    let large = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n", "x".repeat(40 << 10));
    assert_eq!(exporter.ask(&large).status, 431);
    assert_eq!(exporter.end(Signal::TERM), Some(0));
    assert!(!path.exists());
    drop(UnixListener::bind(&path).unwrap());
    chown(&path, Some(1), None).unwrap();
    world.stencil(&["exporter", "--listen", &address]).exits(5).says("belongs to another user");
    assert!(path.exists());
    let log = exporter.log();
    assert!(log.iter().all(|line| line["process"] == "exporter" && line["message"].is_string()), "{log:?}");

    // Connections that send nothing are closed, and the exporter stays usable.
    let exporter = Exporter::start(&world, &[]);
    let idle: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = TcpStream::connect(&exporter.address).unwrap();
            stream.write_all(b"GET /metr").unwrap();
            stream
        })
        .collect();
    assert_eq!(exporter.scrape("").status, 200);
    let threads = fs::read_dir(format!("/proc/{}/task", exporter.pid())).unwrap().count();
    assert!(threads <= 36, "{threads} threads");
    drop(idle);
    for invalid in ["9470", "localhost:1", "unix:relative"] {
        world.stencil(&["exporter", "--listen", invalid]).exits(2);
    }
    world.stencil(&["exporter", "--listen", &exporter.address]).exits(5).says("cannot listen on");
}

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn resident_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn soak_scrapes_leave_no_memory_and_no_descriptor() {
    /// Growth that the allocator may cause; a leak of 100 bytes a scrape is more in `make soak`.
    const MAX_GROWTH: u64 = 512 << 10;
    let _host = host::shared();
    let (world, _) = world("passthrough", 1 << 20);
    world.stencil(&["clone", "web:1", "-n", "5", "--simulate", "write=9p"]).ok();
    // Scrapes that show the last figures, and scrapes that each collect.
    for (max_age, rounds) in [("1", host::rounds(1000, 10_000)), ("0", host::rounds(40, 1000))] {
        let exporter = Exporter::start(&world, &["--max-age", max_age, "--per-clone", "5"]);
        wait_for("figures", || exporter.samples().contains_key("stencil_clones").then_some(()));
        let scrape = |count: usize| {
            for number in 0..count {
                let accept = if number % 2 == 0 { OPEN_METRICS } else { "" };
                exporter.scrape(accept).within(Duration::from_secs(10)).unwrap();
            }
        };
        scrape(rounds / 4);
        let before = resident_bytes(exporter.pid());
        scrape(rounds);
        // A collection has a pipe.
        wait_for("the descriptors of before", || (open_files(exporter.pid()) <= 12).then_some(()));
        let after = resident_bytes(exporter.pid());
        println!("{rounds} scrapes: {before} bytes before, {after} after");
        assert!(after < before + MAX_GROWTH, "{before} bytes before, {after} after");
        let all = exporter.samples();
        assert_eq!(all["stencil_exporter_collection_failures_total{collector=\"mounts\"}"], 0.0);
        let collections = all["stencil_exporter_collections_total{collector=\"mounts\"}"] as usize;
        assert!(max_age != "0" || collections > rounds / 2, "{collections} collections");
    }
}
