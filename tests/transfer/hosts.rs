//! Transfer between two hosts: over ssh, over links that fail in the middle, and use of the template on the second
//! host.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::thread;

use serde_json::Value;
use stencilfs::store::{Digest, Store};

use crate::support::host;
use crate::support::hosts::{Host, Hosts};
use crate::support::mount::{STENCIL, wait_for};
use crate::support::store::{guest_like, random, read_all};

fn import(host: &Host, bytes: &[u8], tag: &str) -> Digest {
    let (memory, state) = (host.path(&tag.replace(':', "-")), host.path("state"));
    fs::write(&memory, bytes).unwrap();
    fs::write(&state, random(5, 70_001)).unwrap();
    let words = ["import", memory.to_str().unwrap(), tag, "--state", state.to_str().unwrap()];
    host.json(&words)["digest"].as_str().unwrap().parse().unwrap()
}

fn assert_same(from: &Path, to: &Path, digest: &Digest) {
    let (from, to) = (Store::open(from).unwrap(), Store::open(to).unwrap());
    for file in 0..2 {
        assert!(
            read_all(&from, digest, file).unwrap() == read_all(&to, digest, file).unwrap(),
            "file {file}"
        );
    }
}

/// Returns the names in a directory of a store; none if it does not exist.
fn names(store: &Path, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(store.join(folder)).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// Runs `save` over a link that is cut after `cut` bytes, and returns the exit code of `load` on the other side.
fn send(hosts: &Hosts, link: usize, cut: Option<usize>) -> i32 {
    let there = hosts.there.path(&format!("{link}"));
    let (store, code, words) = (there.join("store"), there.join("code"), there.join("words"));
    let script = format!(
        "{STENCIL} --store {} load >{} 2>&1; echo $? >{}.new; mv {}.new {}",
        store.display(),
        words.display(),
        code.display(),
        code.display(),
        code.display()
    );
    fs::create_dir_all(&there).unwrap();
    let _ = fs::remove_file(&code);
    let mut save = hosts
        .here
        .command(STENCIL)
        .args(["save", "web:1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ssh = hosts.ssh(link, &script).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut from, mut into) = (save.stdout.take().unwrap(), ssh.stdin.take().unwrap());
    if let Some(cut) = cut {
        std::io::copy(&mut (&mut from).take(cut as u64), &mut into).unwrap();
        into.flush().unwrap();
        hosts.set_link(link, false);
    }
    // Blocks until ssh has detected the dead link.
    let _ = std::io::copy(&mut from, &mut into);
    drop((from, into));
    let (save, ssh) = (save.wait().unwrap(), ssh.wait().unwrap());
    if cut.is_none() {
        assert!(save.success() && ssh.success(), "{save} {ssh}: {:?}", fs::read_to_string(&words));
    }
    let code = wait_for("the exit code of load", || fs::read_to_string(&code).ok());
    code.trim().parse().unwrap()
}

#[test]
fn load_over_a_failing_link_is_complete_or_leaves_nothing() {
    const POINTS: usize = 10;
    let _host = host::shared();
    let hosts = Hosts::new(POINTS);
    let digest = import(&hosts.here, &guest_like(1, 24 << 20), "web:1");
    let stream = hosts.here.path("stream");
    hosts.here.stencil(&["save", "web:1", "-o", stream.to_str().unwrap()]).ok();
    let whole = fs::metadata(&stream).unwrap().len() as usize;
    // Each link has a separate store at its end and fails at a different point, the last link after the last byte.
    let mut incomplete = 0;
    let codes: Vec<i32> = thread::scope(|scope| {
        let send = |link| {
            scope.spawn({
                let hosts = &hosts;
                move || send(hosts, link, Some(whole * (link + 1) / POINTS))
            })
        };
        let threads: Vec<_> = (0..POINTS).map(send).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (link, code) in codes.iter().enumerate() {
        let store = hosts.there.path(&format!("{link}/store"));
        match code {
            0 => assert_same(&hosts.here.store(), &store, &digest),
            3 => {
                incomplete += 1;
                for folder in ["packs", "images", "tags", "tmp"] {
                    assert_eq!(names(&store, folder), Vec::<String>::new(), "link {link}: {folder}");
                }
            }
            other => panic!(
                "link {link}: {other}: {:?}",
                fs::read_to_string(hosts.there.path(&format!("{link}/words")))
            ),
        }
    }
    assert!(incomplete >= POINTS - 1, "{codes:?}");
    // After the link is up again the same command succeeds.
    for link in [0, POINTS / 2] {
        hosts.set_link(link, true);
        wait_for("the link", || hosts.ssh(link, "true").status().is_ok_and(|s| s.success()).then_some(()));
        assert_eq!(send(&hosts, link, None), 0);
        let store = hosts.there.path(&format!("{link}/store"));
        assert_same(&hosts.here.store(), &store, &digest);
        hosts.there.stencil(&["--store", store.to_str().unwrap(), "verify"]).ok();
    }
}

/// The template is used on both hosts; then only the new blocks of a newer version are sent.
#[test]
fn a_transferred_template_is_mounted_and_cloned() {
    let _host = host::shared();
    let hosts = Hosts::new(1);
    let base = guest_like(1, 8 << 20);
    let first = import(&hosts.here, &base, "web:1");
    let send = |words: &[&str]| {
        let mut save = hosts.here.command(STENCIL).args(words).stdout(Stdio::piped()).spawn().unwrap();
        let output = hosts
            .ssh(0, &format!("{STENCIL} --json load"))
            .stdin(save.stdout.take().unwrap())
            .output()
            .unwrap();
        assert!(save.wait().unwrap().success());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let loaded = send(&["save", "web:1"]);
    assert_eq!(loaded["templates"][0]["digest"], first.to_string());

    for host in [&hosts.here, &hosts.there] {
        host.stencil(&["mount", host.mountpoint().to_str().unwrap()]).ok();
        let launched = host.json(&["clone", "web:1", "-n", "3", "--simulate", "read=50%,write=7p"]);
        assert_eq!(launched["digest"], first.to_string());
        let density = host.json(&["density"]);
        let clones = density["clones"].as_array().unwrap();
        assert_eq!(clones.len(), 3, "a host must see only its own clones: {density:#}");
        assert!(clones.iter().all(|c| c["dirty_pages"] == 7), "{density:#}");
        assert_eq!(density["templates"][0]["digest"], first.to_string());
        for (name, source) in [("memory", "web-1"), ("state", "state")] {
            let served = host.mountpoint().join("by-id").join(first.to_string()).join(name);
            let source = hosts.here.path(source);
            let compared = host.command("cmp").args([&served, &source]).output().unwrap();
            assert!(compared.status.success(), "{compared:?}");
        }
    }
    // A mount of one host is visible neither on the other host nor outside.
    assert!(!hosts.there.mountpoint().join("by-id").exists());
    let removed = hosts.there.stencil(&["rm", "web:1"]);
    assert_eq!(removed.code, 5, "{removed:?}");

    let more = [&base[..], &random(9, 1 << 20)].concat();
    let second = import(&hosts.here, &more, "web:2");
    let loaded = send(&["save", "web:2", "--without", "web:1"]);
    assert!(loaded["stream_bytes"].as_u64().unwrap() < (1 << 20) + (64 << 10), "{loaded}");
    assert_same(&hosts.here.store(), &hosts.there.store(), &second);
    // The running mount serves the new template at once, beside the clones of the first.
    let link = hosts.there.mountpoint().join("templates/web/2/memory");
    let compared = hosts.there.command("cmp").args([&link, &hosts.here.path("web-2")]).output().unwrap();
    assert!(compared.status.success(), "{compared:?}");
    for host in [&hosts.here, &hosts.there] {
        host.stencil(&["verify"]).ok();
        host.stencil(&["stop", "--all"]).ok();
        host.stencil(&["umount", host.mountpoint().to_str().unwrap()]).ok();
    }
}
