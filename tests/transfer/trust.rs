//! Limits for the sender of a stream: it cannot block `load`, fill the store, or move tags against the user's will; and
//! the state after a failure.

use std::fs;
use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::store::{Fixture, Ran, random, stencil};
use crate::support::stream::{assert_nothing, assert_same, import, load, save};
use crate::transfer::hostile::seal;

const BLOCK: usize = 64 << 10;

/// Returns the offset of the first image of a stream.
fn image_of(stream: &[u8]) -> usize {
    let number = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap()) as usize;
    number(12) + number(104)
}

fn piped(fixture: &Fixture, words: &[&str], bytes: &[u8]) -> Child {
    let mut command = stencil(fixture.dir.path(), words);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    child
}

/// Waits until the process exits by itself although its input stays open.
fn wait_exit(mut child: Child) -> Ran {
    let stdin = child.stdin.take();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("the command has not exited after 60 s");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(stdin);
    child.wait_with_output().unwrap().into()
}

#[test]
fn load_fails_after_the_stall_timeout() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    let stream = save(&from, &["web:1"]);
    let words = ["load", "--json", "--stall-timeout", "1"];
    for part in [0, 20, 2000, stream.len() - 1] {
        let ran = wait_exit(piped(&to, &words, &stream[..part]));
        assert_eq!(ran.code, 75, "{part}: {ran:?}");
        let error = &ran.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(": no bytes for 1 s; nothing was loaded"), "{ran:?}");
        assert!(error["remedy"].as_str().unwrap().contains("--stall-timeout"), "{ran:?}");
        assert_eq!(error["path"], "standard input");
        assert_nothing(&to);
    }
    let ran = wait_exit(piped(&to, &["import", "-", "web", "--json", "--stall-timeout", "1"], &[1; 5000]));
    assert_eq!(ran.code, 75, "{ran:?}");
    assert!(ran.stdout.contains("stalled at offset 5000: no bytes"), "{ran:?}");
    assert_nothing(&to);
    // Without a limit `load` waits, and accepts bytes that come later.
    let mut child = piped(&to, &["load", "--stall-timeout", "0"], &stream[..2000]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(child.try_wait().unwrap().is_none());
    child.stdin.take().unwrap().write_all(&stream[2000..]).unwrap();
    assert!(child.wait().unwrap().success());
    assert_same(&from, &to, &digest);
}

#[test]
fn load_refuses_blocks_without_a_reference() {
    let (from, other, to) = (Fixture::new(), Fixture::new(), Fixture::new());
    // Two blocks, one of them zero: the image's block count allows one more record.
    from.import("web:1", &[&random(1, BLOCK)[..], &[0; BLOCK]].concat());
    let stream = save(&from, &["web:1"]);
    other.import("more", &random(2, BLOCK));
    let more = save(&other, &["more"]);
    let record = &more[image_of(&more) + 96 + 160 + 32..more.len() - 32];
    let with = |extra: u64| {
        let mut bytes = stream.clone();
        bytes[48..56].copy_from_slice(&(1 + extra).to_le_bytes());
        let end = bytes.len() - 32;
        bytes.splice(end..end, record.repeat(extra as usize));
        seal(&mut bytes);
        bytes
    };
    for (extra, words) in [
        (1, "blocks without a reference in an image: 1, among them"),
        (2, "the stream announces 3 blocks, expected at most 2"),
    ] {
        let ran = load(&to, &with(extra));
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(ran.stdout.contains(words), "{ran:?}");
        assert_nothing(&to);
    }
    // The result does not depend on whether the store has the block: a sender must not learn that.
    load(&to, &more).ok();
    let ran = load(&to, &with(1));
    assert_eq!(ran.code, 3, "{ran:?}");
    to.assert_clean();
    load(&to, &with(0)).ok();
}

#[test]
fn import_and_load_limit_an_image_to_64_tib() {
    let (from, to) = (Fixture::new(), Fixture::new());
    from.import("web:1", &random(1, 3 << 12));
    let mut stream = save(&from, &["web:1"]);
    let (image, size) = (image_of(&stream), 1u64 << 47);
    let blocks = size / BLOCK as u64;
    stream[96..104].copy_from_slice(&(96 + 160 + 32 * blocks).to_le_bytes());
    stream[image + 72..][..8].copy_from_slice(&blocks.to_le_bytes());
    stream[image + 96 + 8..][..8].copy_from_slice(&size.to_le_bytes());
    stream.resize(stream.len() + 2 * BLOCK, 0);
    seal(&mut stream);
    let ran = load(&to, &stream);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(
        ran.stdout.contains("exceeds the limits of an image: 256 files, 70368744177664 bytes"),
        "{ran:?}"
    );
    assert_nothing(&to);

    let source = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    source.as_file().set_len((1 << 46) + 4096).unwrap();
    let ran = to.run(&["import", source.path().to_str().unwrap(), "web"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("the limit is 70368744177664"), "{ran:?}");
    assert_nothing(&to);
}

#[test]
fn load_without_tags_leaves_all_tags_unchanged() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "web:1", 1, "lz4");
    from.run(&["tag", "web:1", "other:x"]).ok();
    save(&from, &["web:1", "other:x"]);
    let stream = from.path("stream");
    let stream = stream.to_str().unwrap();
    let before = to.import("web:1", &random(9, 1 << 20)).digest;
    let tags = || to.store().tags().unwrap().iter().map(|t| t.digest).collect::<Vec<_>>();

    let loaded = to.run(&["load", "-i", stream, "--no-tags", "--json"]).ok().json();
    assert_eq!(loaded["templates"][0]["tags"], json!([]));
    assert_eq!(loaded["templates"][0]["moved"], json!([]));
    assert_eq!(loaded["templates"][0]["digest"], digest.as_str());
    assert_eq!(tags(), [before]);
    assert_same(&from, &to, &digest);

    let text = to.run(&["load", "-i", stream]).ok().stdout;
    let short = before.short();
    assert!(text.contains(&format!("  web:1 moved from {short}, which has no tag now\n")), "{text}");
    assert!(!text.contains("other:x moved"), "{text}");
    assert_eq!(tags().len(), 2);
    assert!(!tags().contains(&before));
}

/// A file blocks the creation of the second tag's directory.
#[test]
fn a_failed_publication_reports_the_published_parts() {
    let (from, to) = (Fixture::new(), Fixture::new());
    let digest = import(&from, "ok:1", 1, "lz4");
    from.run(&["tag", "ok:1", "web:1"]).ok();
    let stream = save(&from, &["ok:1", "web:1"]);
    drop(to.store());
    let obstacle = to.path("store/tags/web");
    fs::write(&obstacle, "").unwrap();
    let ran = load(&to, &stream);
    assert_eq!(ran.code, 1, "{ran:?}");
    let error = &ran.json()["error"];
    let message = error["message"].as_str().unwrap();
    assert!(
        message.starts_with("the commit stopped (packs published: 1, templates: 1, tags: 1): "),
        "{ran:?}"
    );
    assert!(error["remedy"].as_str().unwrap().contains("then 'stencil gc'"), "{ran:?}");
    to.assert_clean();
    assert_same(&from, &to, &digest);
    fs::remove_file(&obstacle).unwrap();
    to.run(&["verify"]).ok();
    let again = load(&to, &stream).ok().json();
    assert_eq!(again["templates"][0]["existed"], true);
    assert_eq!(to.store().tags().unwrap().len(), 2);
}
