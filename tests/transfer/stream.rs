//! Templates as a stream: `load` gives the same digest in the other store, or nothing at all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::error::Code;
use stencilfs::progress::Silent;
use stencilfs::store::{Incoming, LoadRequest};

use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::wait_for;
use crate::support::store::{Fixture, guest_like, random, stencil};
use crate::support::stream::{assert_nothing, assert_same, import, load, load_command, save};

/// Returns the description of a template without times and storage details.
fn described(fixture: &Fixture, reference: &str) -> Value {
    let mut value = fixture.run(&["inspect", reference, "--json"]).ok().json();
    let object = value.as_object_mut().unwrap();
    for field in ["created", "packs", "stored_bytes"] {
        object.remove(field);
    }
    if let Some(policy) = object.get_mut("policy").and_then(Value::as_object_mut) {
        policy.remove("created");
    }
    value
}

#[test]
fn load_stores_the_same_template_in_the_same_encoding() {
    for codec in ["lz4", "zstd:5", "none"] {
        let (from, to) = (Fixture::new(), Fixture::new());
        let digest = import(&from, "web:1", 7, codec);
        let stream = save(&from, &["web:1"]);
        let loaded = load(&to, &stream).ok().json();
        assert_eq!(loaded["schema"], 1);
        assert_eq!(loaded["templates"][0]["digest"], digest.as_str());
        assert_eq!(loaded["templates"][0]["tags"], json!(["web:1"]));
        assert_eq!((&loaded["skipped_blocks"], &loaded["repaired_blocks"]), (&json!(0), &json!(0)));
        assert_eq!(loaded["stream_bytes"], stream.len());
        assert_eq!(described(&from, "web:1"), described(&to, "web:1"), "{codec}");
        assert_same(&from, &to, &digest);
        // Records are copied without recompression: both stores take the same number of bytes.
        let stored =
            |f: &Fixture| f.run(&["ls", "--json"]).ok().json()["templates"][0]["stored_bytes"].clone();
        assert_eq!(stored(&from), stored(&to), "{codec}");
        assert_eq!(loaded["stored_bytes"], stored(&to));
        to.run(&["verify"]).ok();
        to.assert_clean();
        // A stream from the second store has the same length: it depends only on the content.
        assert!(save(&to, &["web:1"]).len() == stream.len());
    }
}

#[test]
fn load_skips_stored_blocks_and_repairs_damaged_ones() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    let stream = save(&from, &["web:1"]);
    load(&to, &stream).ok();
    let packs = to.files("packs");
    let again = load(&to, &stream).ok().json();
    assert_eq!(again["templates"][0]["existed"], true);
    assert_eq!(again["skipped_blocks"], again["blocks"]);
    assert_eq!(again["stored_bytes"], 0);
    assert_eq!(to.files("packs"), packs);
    // A flipped byte in the first record: only that block is stored again.
    let mut bytes = fs::read(&packs[0]).unwrap();
    bytes[300] ^= 1;
    fs::write(&packs[0], bytes).unwrap();
    to.run(&["verify"]).code.eq(&3).then_some(()).expect("verify has not found the damage");
    let repaired = load(&to, &stream).ok().json();
    assert_eq!(repaired["repaired_blocks"], 1);
    assert_same(&from, &to, &digest);
    to.run(&["verify"]).ok();
}

#[test]
fn load_moves_tags_and_keeps_an_existing_policy() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    from.run(&["tag", "web:1", "other:x"]).ok();
    let other = to.import("web:1", &guest_like(9, 1 << 20)).digest.to_string();
    // `save TAG` includes only that tag, `save DIGEST` all tags of the template.
    let loaded = load(&to, &save(&from, &["web:1"])).ok().json();
    assert_eq!(
        loaded["templates"][0]["moved"],
        json!([{"tag": "web:1", "former_digest": other, "former_untagged": true}])
    );
    assert_eq!(to.store().tags().unwrap().len(), 1);
    let both = load(&to, &save(&from, &["web:1", "other:x", "web:1"])).ok().json();
    assert_eq!(both["templates"].as_array().unwrap().len(), 1);
    assert_eq!(both["templates"][0]["tags"], json!(["web:1", "other:x"]));
    to.run(&["rm", "other:x"]).ok();
    let loaded = load(&to, &save(&from, &[&digest[..12]])).ok().json();
    assert_eq!(loaded["templates"][0]["tags"], json!(["other:x", "web:1"]));
    assert_eq!(loaded["templates"][0]["moved"], json!([]));
    assert_eq!(to.store().tags().unwrap().len(), 2);

    to.run(&["chmod", "0400", "web:1"]).ok();
    load(&to, &save(&from, &["web:1"])).ok();
    assert_eq!(to.store().template(&digest.parse().unwrap()).unwrap().policy().mode, 0o400);
    let stream = from.path("stream");
    to.run(&["load", "-i", stream.to_str().unwrap(), "--mode", "0444", "--owner", "7"]).ok();
    let policy = to.store().template(&digest.parse().unwrap()).unwrap().policy().clone();
    assert_eq!((policy.mode, policy.uid, policy.gid), (0o444, 7, 13));
    assert!(policy.recipe.is_some());
    let bare = Fixture::new();
    let out = bare.run(&["load", "-i", stream.to_str().unwrap(), "--no-recipes"]).ok();
    assert!(!out.stdout.contains("recipe"), "{}", out.stdout);
    assert!(bare.store().template(&digest.parse().unwrap()).unwrap().policy().recipe.is_none());
}

#[test]
fn a_stream_shares_blocks_and_omits_those_of_a_base() {
    let (from, to, bare) = (Fixture::new(), Fixture::new(), Fixture::new());
    let base = guest_like(1, 4 << 20);
    let more = [&base[..], &random(2, 1 << 20)[..]].concat();
    let (a, b) = (from.import("base", &base).digest, from.import("app", &more).digest);
    let both = save(&from, &["base", "app"]);
    let alone = save(&from, &["app"]);
    assert!(both.len() < alone.len() + (64 << 10), "{} and {}", both.len(), alone.len());
    let loaded = load(&to, &both).ok().json();
    assert_eq!(loaded["templates"].as_array().unwrap().len(), 2);
    assert_same(&from, &to, &a.to_string());
    assert_same(&from, &to, &b.to_string());

    let rest = save(&from, &["app", "--without", "base"]);
    assert!(rest.len() > 1 << 20 && rest.len() < (1 << 20) + (64 << 10), "{}", rest.len());
    let refused = load(&bare, &rest);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stdout.contains(&a.to_string()), "{refused:?}");
    assert_nothing(&bare);
    load(&bare, &save(&from, &["base"])).ok();
    load(&bare, &rest).ok();
    assert_same(&from, &bare, &b.to_string());
    // A damaged base cannot replace the omitted blocks.
    bare.run(&["rm", "app"]).ok();
    for pack in bare.files("packs") {
        let mut bytes = fs::read(&pack).unwrap();
        bytes[300] ^= 1;
        fs::write(&pack, bytes).unwrap();
    }
    let refused = load(&bare, &rest);
    assert_eq!(refused.code, 4, "{refused:?}");
    bare.assert_clean();
    assert_eq!(bare.store().tags().unwrap().len(), 1);
}

#[test]
fn load_refuses_invalid_input_without_creating_a_store() {
    let (from, to) = (Fixture::new(), Fixture::new());
    import(&from, "web:1", 1, "lz4");
    let stream = save(&from, &["web:1"]);
    let mut newer = stream.clone();
    newer[8] = 2;
    let front = u32::from_le_bytes(newer[12..16].try_into().unwrap()) as usize;
    let sum = blake3::hash(&newer[..front - 32]);
    newer[front - 32..front].copy_from_slice(sum.as_bytes());
    let cases: [(&[u8], i32, &str); 4] = [
        (b"", 3, "truncated at offset 0, within the header"),
        (b"STNC", 3, "truncated at offset 4, within the header"),
        (b"QFI\xfb and more", 2, "not a stream from 'stencil save'"),
        (&newer, 1, "needs a newer Stencil"),
    ];
    for (bytes, code, words) in cases {
        let ran = load(&to, bytes);
        assert_eq!(ran.code, code, "{ran:?}");
        assert!(ran.stdout.contains(words), "{ran:?}");
        assert!(!to.path("store").exists());
    }
    let folder = to.run(&["load", "-i", "/"]);
    assert_eq!((folder.code, folder.stderr.lines().count()), (2, 2), "{folder:?}");
    assert_eq!(to.run(&["load", "-i", "/no/such/file"]).code, 4);
    assert_eq!(from.run(&["save", "no-such"]).code, 4);
    assert_eq!(from.run(&["save", "web:1", "--json"]).code, 2);
    assert_eq!(from.run(&["save", "web:1", "-o", "/"]).code, 2);
    assert_eq!(from.run(&["save", "web:1", "-o", "/no/such/folder/x"]).code, 4);
    // Terminals are refused as input and output.
    for (words, hint) in [(&["save", "web:1"][..], "| ssh HOST stencil load"), (&["load"], "| stencil load")]
    {
        let pty =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&pty).unwrap();
        rustix::pty::unlockpt(&pty).unwrap();
        let name = rustix::pty::ptsname(&pty, Vec::new()).unwrap();
        let terminal = || File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let output = stencil(from.dir.path(), words)
            .stdin(terminal())
            .stdout(terminal())
            .stderr(Stdio::piped())
            .output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(hint), "{output:?}");
    }
}

#[test]
fn save_refuses_damaged_blocks() {
    let (from, to) = (Fixture::new(), Fixture::new());
    import(&from, "web:1", 1, "lz4");
    let pack = from.files("packs").remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[300] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let target = from.path("target");
    let ran = from.run(&["save", "web:1", "-o", target.to_str().unwrap()]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(!target.exists());
    let output = stencil(from.dir.path(), &["save", "web:1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(load(&to, &output.stdout).code, 3);
    assert_nothing(&to);
}

/// `load` gets a prefix of a real `save`, then the end of the pipe.
#[test]
fn load_of_a_truncated_pipe_leaves_nothing() {
    let from = Fixture::new();
    let digest = import(&from, "web:1", 1, "lz4");
    let whole = save(&from, &["web:1"]).len();
    let to = Fixture::new();
    for cut in (0..10).map(|tenth| whole * tenth / 10 + 13).chain([whole - 1, whole]) {
        let mut save = stencil(from.dir.path(), &["save", "web:1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut load = load_command(&to).spawn().unwrap();
        let mut part = save.stdout.take().unwrap().take(cut as u64);
        let mut into = load.stdin.take().unwrap();
        let copied = std::io::copy(&mut part, &mut into).unwrap();
        assert_eq!(copied, cut as u64);
        drop((part, into));
        let (save, load) = (save.wait_with_output().unwrap(), load.wait_with_output().unwrap());
        if cut == whole {
            assert_eq!(load.status.code(), Some(0));
            assert_same(&from, &to, &digest);
        } else {
            assert_eq!(load.status.code(), Some(3), "{load:?}");
            assert_nothing(&to);
        }
        // If the rest of the stream fits into the pipe's buffer, `save` succeeds; otherwise it gets EPIPE.
        let stderr = String::from_utf8_lossy(&save.stderr);
        assert!(save.status.success() || stderr.contains("Broken pipe"), "{stderr}");
        assert!(save.status.success() || stderr.lines().count() == 2, "{stderr}");
        assert!(
            !save.status.success() || whole - cut < 2 << 20,
            "save has not reported the cut at {cut} of {whole}"
        );
    }
}

#[test]
fn load_refuses_every_truncation_and_every_addition() {
    let from = Fixture::new();
    from.import("web:1", &[&random(1, 3 << 12)[..], &[0; 1 << 16]].concat());
    let stream = save(&from, &["web:1"]);
    let to = Fixture::new();
    let store = to.store();
    let path = to.path("incoming");
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let loaded = Incoming::open(File::open(&path).unwrap(), &path, None, None)
            .and_then(|stream| store.load(stream, &LoadRequest::default(), &Silent));
        match loaded {
            Ok(_) => false,
            Err(e) => {
                assert_eq!(e.code(), Code::Damage, "{e}");
                true
            }
        }
    };
    for length in (0..stream.len()).filter(|n| *n < 800 || n % 1009 == 0 || *n + 100 > stream.len()) {
        assert!(refused(&stream[..length]), "{length} of {}", stream.len());
    }
    for tail in [&b"\0"[..], b"\n", &stream] {
        assert!(refused(&[&stream[..], tail].concat()));
    }
    assert_nothing(&to);
    assert!(!refused(&stream));
}

fn signal(child: &Child, signal: Signal) {
    let _ = kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal);
}

#[test]
fn an_interrupted_load_or_save_cleans_up_at_once() {
    let (from, to) = (Fixture::new(), Fixture::new());
    import(&from, "web:1", 1, "lz4");
    let stream = save(&from, &["web:1"]);
    for number in [Signal::INT, Signal::TERM] {
        let mut load = load_command(&to).spawn().unwrap();
        load.stdin.as_mut().unwrap().write_all(&stream[..stream.len() - 1000]).unwrap();
        wait_for("a session", || {
            let begun = to.path("store").exists() && !to.files("tmp").is_empty();
            begun.then_some(())
        });
        signal(&load, number);
        let stdin = load.stdin.take();
        let output = load.wait_with_output().unwrap();
        drop(stdin);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains("interrupted"), "{output:?}");
        assert_nothing(&to);

        // Nothing reads the pipe: `save` blocks in the middle of a write. The tests may run in a background job that
        // ignores SIGINT, which `env` undoes.
        let plain = stencil(from.dir.path(), &["save", "web:1"]);
        let mut command = Command::new("env");
        command.arg("--default-signal=INT,TERM").arg(plain.get_program()).args(plain.get_args());
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut save = command.stdout(Stdio::piped()).spawn().unwrap();
        wait_for("a lease", || leases(&from, "web:1").first().cloned());
        signal(&save, number);
        assert!(!save.wait().unwrap().success());
        assert_eq!(leases(&from, "web:1"), Vec::<Value>::new());
    }
}

fn leases(fixture: &Fixture, reference: &str) -> Vec<Value> {
    fixture.run(&["inspect", reference, "--json"]).ok().json()["leases"].as_array().unwrap().clone()
}

#[test]
fn rm_refuses_a_template_that_is_being_saved() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "none");
    let mut save = stencil(from.dir.path(), &["save", "web:1"]).stdout(Stdio::piped()).spawn().unwrap();
    let lease = wait_for("a lease", || leases(&from, "web:1").first().cloned());
    assert_eq!((&lease["command"], &lease["pid"]), (&json!("save"), &json!(save.id())));
    let refused = from.run(&["rm", "web:1"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.stderr.contains(&save.id().to_string()), "{refused:?}");
    let mut stream = Vec::new();
    save.stdout.take().unwrap().read_to_end(&mut stream).unwrap();
    assert!(save.wait().unwrap().success());
    load(&to, &stream).ok();
    assert_same(&from, &to, &digest);
    from.run(&["rm", "web:1"]).ok();
}

/// Sends SIGKILL at many moments between start and end of a load.
#[test]
fn a_killed_load_leaves_a_sound_store() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digests =
        [("a", 5), ("b", 6)].map(|(name, seed)| from.import(name, &guest_like(seed, 12 << 20)).digest);
    to.import("base", &guest_like(7, 1 << 20));
    save(&from, &["a", "b"]);
    let stream = from.path("stream");
    let words = ["load", "-i", stream.to_str().unwrap()];
    let start = Instant::now();
    to.run(&words).ok();
    let mut whole = start.elapsed();
    let attempts: u32 = host::rounds(25, 100);
    let (mut killed, mut found) = (0, 0);
    for attempt in 0..attempts {
        for name in ["a", "b"] {
            to.run(&["rm", name]);
        }
        for digest in &digests {
            to.run(&["rm", &digest.to_string()]);
        }
        for pack in to.files("packs").into_iter().skip(1).filter(|_| attempt % 2 == 0) {
            // In half of the attempts `load` has to write all blocks. The pack of "base" may be deleted too, so "base"
            // is imported again below.
            fs::remove_file(pack).unwrap();
        }
        to.import("base", &guest_like(7, 1 << 20));
        let mut child = stencil(to.dir.path(), &words).stdout(Stdio::null()).spawn().unwrap();
        let share = f64::from(attempt) / f64::from(attempts);
        thread::sleep(whole.mul_f64(share.sqrt()));
        signal(&child, Signal::KILL);
        killed += u32::from(child.wait().unwrap().code().is_none());
        let tags = to.store().tags().unwrap();
        let loaded: Vec<_> = tags.iter().filter(|t| t.name != "base").collect();
        found += loaded.len();
        if loaded.is_empty() && share > 0.5 {
            // The host has become slower: the next kill comes later.
            whole = whole.mul_f64(1.2);
        }
        for tag in loaded {
            assert_same(&from, &to, &tag.digest.to_string());
        }
        for digest in to.store().digests().unwrap() {
            to.store().template(&digest).unwrap();
        }
        let verified = to.run(&["verify"]);
        assert_eq!(verified.code, 0, "attempt {attempt}: {verified:?}");
    }
    to.run(&words).ok();
    to.assert_clean();
    assert!(killed > 0, "none of {attempts} loads was killed before it finished");
    assert!(found > 0, "none of {attempts} loads had published a tag before the kill");
}

#[test]
fn load_on_a_full_disk_leaves_nothing() {
    let (from, to) = (Fixture::new(), Fixture::new());
    from.import("web:1", &random(1, 12 << 20));
    let stream = save(&from, &["web:1"]);
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(to.dir.path()).status();
    assert!(mounted.unwrap().success());
    let _small = Mounted(to.dir.path().to_owned());
    let ran = load(&to, &stream);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stdout.contains("No space left") && ran.stdout.contains("free space"), "{ran:?}");
    assert_nothing(&to);
    let target = to.path("target");
    let ran = stencil(from.dir.path(), &["save", "web:1", "-o", target.to_str().unwrap()]).output().unwrap();
    assert_eq!(ran.status.code(), Some(1));
    assert!(!target.exists());
    assert_eq!(fs::read_dir(to.dir.path()).unwrap().count(), 1, "save has left a file");
}
