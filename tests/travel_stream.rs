//! Templates as a stream: the same digest on the other side, or nothing at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::error::Code;
use stencilfs::progress::Silent;
use stencilfs::store::{FileKind, ImportFile, Incoming, LoadRequest, Source};

use crate::support::host;
use crate::support::mount::wait_for;
use crate::support::store::{Fixture, guest_like, random, read_all, stencil};

/// A template of three files, in this way of storing, with everything that a policy can say.
fn import(fixture: &Fixture, tag: &str, seed: u64, codec: &str, chunk: &str) -> String {
    let mut request = fixture.request(tag, &guest_like(seed, 3 << 20));
    for (name, kind, length) in [("rom", FileKind::Rom, 64 << 10), ("state", FileKind::Blob, 70_001)] {
        let source =
            Source::Path(fixture.file(&format!("{seed}-{name}"), &random(seed + length, length as usize)));
        request.files.push(ImportFile { name: name.into(), kind, source });
    }
    request.compression = codec.parse().unwrap();
    request.chunk_size = chunk.parse().unwrap();
    request.mode = Some(0o440);
    request.owner = "12:13".parse().unwrap();
    request.labels = BTreeMap::from([("made".into(), "by hand".into())]);
    request.recipe = Some(json!({"version": 1, "vmm": "qemu", "program": "/bin/false", "args": []}));
    fixture.store().import(request, &Silent).unwrap().digest.to_string()
}

/// Saves with these words and gives the stream.
fn save(fixture: &Fixture, words: &[&str]) -> Vec<u8> {
    let path = fixture.path("stream");
    fixture.run(&[&["save", "-o", path.to_str().unwrap()], words].concat()).ok();
    fs::read(path).unwrap()
}

fn load_command(fixture: &Fixture) -> Command {
    let mut command = stencil(fixture.dir.path(), &["load", "--json"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Loads from a pipe. A reader that refuses early need not take everything.
fn load(fixture: &Fixture, bytes: &[u8]) -> crate::support::store::Ran {
    let mut child = load_command(fixture).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes));
        child.wait_with_output().unwrap().into()
    })
}

/// What a template says of itself, apart from its time and its place.
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

/// There is no store, or an empty one.
fn assert_nothing(fixture: &Fixture) {
    if !fixture.path("store").exists() {
        return;
    }
    fixture.assert_clean();
    for folder in ["packs", "images", "tags"] {
        assert_eq!(fixture.files(folder), Vec::<PathBuf>::new());
    }
}

fn assert_same(from: &Fixture, to: &Fixture, digest: &str) {
    let digest = digest.parse().unwrap();
    let files = from.store().template(&digest).unwrap().files().len();
    for file in 0..files {
        let (a, b) = (read_all(&from.store(), &digest, file), read_all(&to.store(), &digest, file));
        assert!(a.unwrap() == b.unwrap(), "file {file} of {digest}");
    }
}

#[test]
fn the_other_store_has_the_same_template_stored_in_the_same_way() {
    for (codec, chunk) in [("lz4", "64k"), ("zstd:5", "16k"), ("none", "64k"), ("lz4", "4k")] {
        let (from, to) = (Fixture::new(), Fixture::new());
        let digest = import(&from, "web:1", 7, codec, chunk);
        let stream = save(&from, &["web:1"]);
        let loaded = load(&to, &stream).ok().json();
        assert_eq!(loaded["schema"], 1);
        assert_eq!(loaded["templates"][0]["digest"], digest.as_str());
        assert_eq!(loaded["templates"][0]["tags"], json!(["web:1"]));
        assert_eq!((&loaded["skipped_blocks"], &loaded["repaired_blocks"]), (&json!(0), &json!(0)));
        assert_eq!(loaded["stream_bytes"], stream.len());
        assert_eq!(described(&from, "web:1"), described(&to, "web:1"), "{codec} {chunk}");
        assert_same(&from, &to, &digest);
        // As stored, not compressed anew: the bytes that the other store takes are the same.
        let stored =
            |f: &Fixture| f.run(&["ls", "--json"]).ok().json()["templates"][0]["stored_bytes"].clone();
        assert_eq!(stored(&from), stored(&to), "{codec} {chunk}");
        assert_eq!(loaded["stored_bytes"], stored(&to));
        to.run(&["verify"]).ok();
        to.assert_clean();
        // And back again: the stream depends on nothing but the content.
        assert!(save(&to, &["web:1"]).len() == stream.len());
    }
}

#[test]
fn what_is_there_is_not_written_again_and_what_is_damaged_is_mended() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4", "64k");
    let stream = save(&from, &["web:1"]);
    load(&to, &stream).ok();
    let packs = to.files("packs");
    let again = load(&to, &stream).ok().json();
    assert_eq!(again["templates"][0]["existed"], true);
    assert_eq!(again["skipped_blocks"], again["blocks"]);
    assert_eq!(again["stored_bytes"], 0);
    assert_eq!(to.files("packs"), packs);
    // A flipped byte in the first record: that block is stored anew.
    let mut bytes = fs::read(&packs[0]).unwrap();
    bytes[300] ^= 1;
    fs::write(&packs[0], bytes).unwrap();
    to.run(&["verify"]).code.eq(&3).then_some(()).expect("damage is found");
    let mended = load(&to, &stream).ok().json();
    assert_eq!(mended["repaired_blocks"], 1);
    assert_same(&from, &to, &digest);
    to.run(&["verify"]).ok();
}

#[test]
fn tags_move_and_the_policy_that_is_there_stays() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4", "64k");
    from.run(&["tag", "web:1", "other:x"]).ok();
    let other = to.import("web:1", &guest_like(9, 1 << 20)).digest.to_string();
    // A tag takes itself along, a digest all of its tags.
    let loaded = load(&to, &save(&from, &["web:1"])).ok().json();
    assert_eq!(loaded["templates"][0]["moved"], json!([{"tag": "web:1", "from": other}]));
    assert_eq!(to.store().tags().unwrap().len(), 1);
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
fn several_templates_share_their_blocks_and_some_are_left_out() {
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
    // A base that is there but damaged cannot stand in for its blocks.
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
fn what_is_no_stream_is_refused_in_one_line_and_makes_no_store() {
    let (from, to) = (Fixture::new(), Fixture::new());
    import(&from, "web:1", 1, "lz4", "64k");
    let stream = save(&from, &["web:1"]);
    let mut newer = stream.clone();
    newer[8] = 2;
    let cases: [(&[u8], i32, &str); 4] = [
        (b"", 3, "it ends after 0 bytes"),
        (b"STNC", 3, "it ends after 4 bytes"),
        (b"QFI\xfb and more", 2, "no stream of stencil save"),
        (&newer, 1, "needs a newer Stencil"),
    ];
    for (bytes, code, words) in cases {
        let ran = load(&to, bytes);
        assert_eq!(ran.code, code, "{ran:?}");
        assert!(ran.stdout.contains(words), "{ran:?}");
        assert!(!to.path("store").exists());
    }
    let folder = to.run(&["load", "-i", "/"]);
    assert_eq!((folder.code, folder.stderr.lines().count()), (1, 2), "{folder:?}");
    assert_eq!(to.run(&["load", "-i", "/no/such/file"]).code, 4);
    assert_eq!(from.run(&["save", "no-such"]).code, 4);
    assert_eq!(from.run(&["save", "web:1", "--json"]).code, 2);
    assert_eq!(from.run(&["save", "web:1", "-o", "/"]).code, 2);
    assert_eq!(from.run(&["save", "web:1", "-o", "/no/such/folder/x"]).code, 4);
    // Neither end is a terminal's.
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
fn damage_does_not_travel() {
    let (from, to) = (Fixture::new(), Fixture::new());
    import(&from, "web:1", 1, "lz4", "64k");
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

/// The reader of a pipe gets this many bytes of a real `save`, then its end.
#[test]
fn a_pipe_that_is_cut_at_ten_points() {
    let from = Fixture::new();
    let digest = import(&from, "web:1", 1, "lz4", "64k");
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
        // Short ends fit into the pipe; else the writer hears of it.
        let heard = String::from_utf8_lossy(&save.stderr);
        assert!(save.status.success() || heard.contains("Broken pipe"), "{heard}");
        assert!(save.status.success() || heard.lines().count() == 2, "{heard}");
        assert!(!save.status.success() || whole - cut < 2 << 20, "cut at {cut} of {whole} was not heard of");
    }
}

#[test]
fn every_end_and_every_addition_is_refused() {
    let from = Fixture::new();
    from.import("web:1", &[&random(1, 3 << 12)[..], &[0; 1 << 16]].concat());
    let stream = save(&from, &["web:1"]);
    let to = Fixture::new();
    let store = to.store();
    let path = to.path("incoming");
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let loaded = Incoming::open(File::open(&path).unwrap(), &path, None)
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
    import(&from, "web:1", 1, "lz4", "64k");
    let stream = save(&from, &["web:1"]);
    for number in [Signal::INT, Signal::TERM] {
        let mut load = load_command(&to).spawn().unwrap();
        load.stdin.as_mut().unwrap().write_all(&stream[..stream.len() - 1000]).unwrap();
        wait_for("a session", || {
            (!to.path("store").exists() || to.files("tmp").is_empty()).then_some(()).xor(Some(()))
        });
        signal(&load, number);
        let stdin = load.stdin.take();
        let output = load.wait_with_output().unwrap();
        drop(stdin);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains("interrupted"), "{output:?}");
        assert_nothing(&to);

        // Nobody takes what is saved: the writer stands in the middle of a write.
        let mut save = stencil(from.dir.path(), &["save", "web:1"]).stdout(Stdio::piped()).spawn().unwrap();
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
fn what_is_being_saved_is_not_removed() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "none", "64k");
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

/// SIGKILL at many moments between the begin and the end of a load.
#[test]
fn a_killed_load_leaves_nothing_that_matters() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digests =
        [("a", 5), ("b", 6)].map(|(name, seed)| from.import(name, &guest_like(seed, 12 << 20)).digest);
    to.import("base", &guest_like(7, 1 << 20));
    save(&from, &["a", "b"]);
    let stream = from.path("stream");
    let words = ["load", "-i", stream.to_str().unwrap()];
    let start = Instant::now();
    to.run(&words).ok();
    let whole = start.elapsed();
    let attempts: u32 = host::rounds(25, 150);
    let (mut killed, mut found) = (0, 0);
    for attempt in 0..attempts {
        for name in ["a", "b"] {
            to.run(&["rm", name]);
        }
        for digest in &digests {
            to.run(&["rm", &digest.to_string()]);
        }
        for pack in to.files("packs").into_iter().skip(1).filter(|_| attempt % 2 == 0) {
            // Half of the attempts have everything to write; the pack of "base" may go with them, then it is loaded.
            fs::remove_file(pack).unwrap();
        }
        to.import("base", &guest_like(7, 1 << 20));
        let mut child = stencil(to.dir.path(), &words).stdout(Stdio::null()).spawn().unwrap();
        let share = f64::from(attempt + 1) / f64::from(attempts);
        thread::sleep(whole.mul_f64(share.sqrt()));
        signal(&child, Signal::KILL);
        killed += u32::from(child.wait().unwrap().code().is_none());
        for tag in to.store().tags().unwrap().iter().filter(|t| t.name != "base") {
            found += 1;
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
    assert!(killed > 0, "none of {attempts} was killed before its end; {found} tags were found");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let (from, to) = (Fixture::new(), Fixture::new());
    from.import("web:1", &random(1, 12 << 20));
    let stream = save(&from, &["web:1"]);
    let _small = SmallDisk::mount(to.dir.path());
    let ran = load(&to, &stream);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stdout.contains("No space left") && ran.stdout.contains("free space"), "{ran:?}");
    assert_nothing(&to);
    let target = to.path("target");
    let ran = stencil(from.dir.path(), &["save", "web:1", "-o", target.to_str().unwrap()]).output().unwrap();
    assert_eq!(ran.status.code(), Some(1));
    assert!(!target.exists());
    assert_eq!(fs::read_dir(to.dir.path()).unwrap().count(), 1, "the store alone");
}

/// A tmpfs of 8 MiB, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> SmallDisk {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(at).status();
        assert!(mounted.unwrap().success());
        SmallDisk(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        assert!(done.is_ok_and(|s| s.success()) || thread::panicking());
    }
}

/// What a hostile sender can do: every checksum may be right.
mod hostile {
    use super::*;

    /// The next number of a row that is the same in each run.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, below: usize) -> usize {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 33) % below as u64) as usize
        }
    }

    /// The hashes of front and stream made right again.
    fn seal(stream: &mut [u8]) {
        let end = stream.len() - 32;
        let front = u32::from_le_bytes(stream[12..16].try_into().unwrap()) as usize;
        if (64..end).contains(&front) {
            let hash = blake3::hash(&stream[..front - 32]);
            stream[front - 32..front].copy_from_slice(hash.as_bytes());
        }
        let hash = blake3::hash(&stream[..end]);
        stream[end..].copy_from_slice(hash.as_bytes());
    }

    fn mutate(stream: &[u8], dice: &mut Dice) -> Vec<u8> {
        let mut bytes = stream.to_vec();
        // Most of a stream is records; what stands around them is more interesting.
        let place = |dice: &mut Dice, length: usize| match dice.roll(3) {
            0 => dice.roll(length),
            1 => dice.roll(length.min(400)),
            _ => dice.roll(length.min(2400)),
        };
        for _ in 0..=dice.roll(3) {
            let (at, length) = (place(dice, bytes.len()), bytes.len());
            match dice.roll(7) {
                0 => bytes[at] ^= 1 << dice.roll(8),
                1 => bytes[at] = [0, 1, 0x7f, 0xff][dice.roll(4)],
                2 => bytes.truncate(at.max(1)),
                3 => drop(bytes.drain(at..(at + 1 + dice.roll(70)).min(length))),
                4 => {
                    let part = bytes[at..(at + 1 + dice.roll(200)).min(length)].to_vec();
                    let to = place(dice, length);
                    bytes.splice(to..to, part);
                }
                5 => {
                    let number = [0u32, 1, 0xffff, 1 << 31, u32::MAX][dice.roll(5)].to_le_bytes();
                    let at = at / 4 * 4;
                    let end = (at + 4).min(length);
                    bytes[at..end].copy_from_slice(&number[..end - at]);
                }
                _ => {
                    let to = place(dice, length);
                    bytes.swap(at, to);
                }
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        if bytes.len() > 100 && dice.roll(5) > 0 {
            seal(&mut bytes);
        }
        bytes
    }

    #[test]
    fn mutated_streams_give_the_right_template_or_nothing() {
        let from = Fixture::new();
        let bytes = [&random(1, 3 << 12)[..], &[0; 1 << 16], &guest_like(3, 70 << 10)[..68 << 10]].concat();
        from.import("web:1", &bytes);
        import(&from, "more", 4, "zstd", "8k");
        let streams = [save(&from, &["web:1"]), save(&from, &["more", "web:1"])];
        let to = Fixture::new();
        let store = to.store();
        let path = to.path("incoming");
        let mut dice = Dice(host::rounds(1, u64::from(std::process::id())));
        let (mut accepted, mut refused) = (0, 0);
        let rounds = host::rounds(3000, 30_000);
        for round in 0..rounds {
            // The small one mostly: it is the header that has something to lie about.
            let stream = &streams[usize::from(round % 16 == 0)];
            let mutated = mutate(stream, &mut dice);
            fs::write(&path, &mutated).unwrap();
            let loaded = Incoming::open(File::open(&path).unwrap(), &path, None)
                .and_then(|stream| store.load(stream, &LoadRequest::default(), &Silent));
            match loaded {
                Err(e) => {
                    assert!(
                        [Code::Damage, Code::Usage, Code::NotFound].contains(&e.code())
                            || e.message().contains("newer"),
                        "round {round}: {e}"
                    );
                    refused += 1;
                }
                Ok(loaded) => {
                    accepted += 1;
                    for template in loaded.templates {
                        let digest = template.digest.to_string();
                        // A digest is its content: what was accepted is what was saved, under whatever name.
                        assert!(from.store().has(&template.digest), "round {round}: {digest} was made up");
                        assert_same(&from, &to, &digest);
                        let policy = store.template(&template.digest).unwrap().policy().clone();
                        assert_eq!(policy.mode & !0o444, 0);
                        store.remove(&digest.parse().unwrap(), |_| Ok(())).unwrap();
                    }
                }
            }
        }
        assert_eq!(store.digests().unwrap(), []);
        assert_eq!(store.tags().unwrap(), []);
        to.assert_clean();
        to.run(&["verify"]).ok();
        assert!(refused > rounds / 2 && accepted > 0, "{refused} refused, {accepted} accepted");
    }

    /// What only somebody who makes streams on purpose can send.
    #[test]
    fn lies_with_right_checksums_are_named() {
        let from = Fixture::new();
        from.import("web:1", &random(1, 3 << 12));
        let stream = save(&from, &["web:1"]);
        let to = Fixture::new();
        let front = u32::from_le_bytes(stream[12..16].try_into().unwrap()) as usize;
        let policy = u32::from_le_bytes(stream[104..108].try_into().unwrap()) as usize;
        let at = |offset: usize, bytes: &[u8]| {
            let mut stream = stream.clone();
            stream[offset..offset + bytes.len()].copy_from_slice(bytes);
            seal(&mut stream);
            stream
        };
        // The policy with other words of the same length, and its own hash right.
        let body_at = front + "stencil policy 1 blake3:".len() + 64 + 1;
        let body = String::from_utf8(stream[body_at..front + policy].to_vec()).unwrap();
        assert!(body.contains("\"mode\": 292"), "{body}");
        let body = body.replace("\"mode\": 292", "\"mode\": 493");
        let hash = blake3::hash(body.as_bytes()).to_hex();
        let writable = at(front + 24, &[hash.as_bytes(), b"\n", body.as_bytes()].concat());
        let image = front + policy;
        let record = image + 96 + 160 + 32;
        let cases: [(Vec<u8>, &str); 10] = [
            (at(40, &[0; 4]), "0 templates"),
            (at(40, &[0xff; 4]), "templates"),
            (at(48, &[0xff; 8]), "it ends after"),
            (at(48, &[0; 8]), "its content has hash"),
            (at(96, &[0xff; 8]), "it ends after"),
            (at(96, &[0x21]), "has 289 bytes, expected 288"),
            (at(104, &[0xff; 4]), "has 4294967295 bytes"),
            (writable, "gives mode 755"),
            (at(image + 96 + 8, &[0xff]), "has hash"),
            (at(record + 40, &[1]), "is not what was saved"),
        ];
        for (number, (bytes, words)) in cases.into_iter().enumerate() {
            let ran = load(&to, &bytes);
            assert_eq!(ran.code, 3, "case {number}: {ran:?}");
            assert!(ran.stdout.contains(words), "case {number}: '{words}' is not in {ran:?}");
            assert_nothing(&to);
        }
        load(&to, &stream).ok();
    }
}
