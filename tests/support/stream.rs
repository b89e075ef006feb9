//! Template streams: their content, and both ends of the pipe.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use serde_json::json;
use stencilfs::progress::Silent;
use stencilfs::store::{FileKind, ImportFile, Source};

use crate::support::store::{Fixture, Ran, guest_like, random, read_all, stencil};

/// Imports a template of three files with the given codec, and with every field of a policy set. Returns
/// its digest.
pub fn import(fixture: &Fixture, tag: &str, seed: u64, codec: &str) -> String {
    let mut request = fixture.request(tag, &guest_like(seed, 3 << 20));
    for (name, kind, length) in [("rom", FileKind::Rom, 64 << 10), ("state", FileKind::Blob, 70_001)] {
        let source =
            Source::Path(fixture.file(&format!("{seed}-{name}"), &random(seed + length, length as usize)));
        request.files.push(ImportFile { name: name.into(), kind, source });
    }
    request.compression = codec.parse().unwrap();
    request.mode = Some(0o440);
    request.owner = "12:13".parse().unwrap();
    request.labels = BTreeMap::from([("made".into(), "by hand".into())]);
    request.recipe = Some(json!({"version": 1, "vmm": "qemu", "program": "/bin/false", "args": []}));
    fixture.store().import(request, &Silent).unwrap().digest.to_string()
}

/// Runs `stencil save` with these arguments and returns the stream.
pub fn save(fixture: &Fixture, words: &[&str]) -> Vec<u8> {
    let path = fixture.path("stream");
    fixture.run(&[&["save", "--force", "-o", path.to_str().unwrap()], words].concat()).ok();
    fs::read(path).unwrap()
}

pub fn load_command(fixture: &Fixture) -> Command {
    let mut command = stencil(fixture.dir.path(), &["load", "--json"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `stencil load` on a pipe. A `load` that refuses early need not read all bytes.
pub fn load(fixture: &Fixture, bytes: &[u8]) -> Ran {
    let mut child = load_command(fixture).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes));
        child.wait_with_output().unwrap().into()
    })
}

/// Panics unless there is no store or an empty one.
pub fn assert_nothing(fixture: &Fixture) {
    if !fixture.path("store").exists() {
        return;
    }
    fixture.assert_clean();
    for directory in ["packs", "images", "tags"] {
        assert_eq!(fixture.files(directory), Vec::<PathBuf>::new());
    }
}

pub fn assert_same(from: &Fixture, to: &Fixture, digest: &str) {
    let digest = digest.parse().unwrap();
    let files = from.store().template(&digest).unwrap().files().len();
    for file in 0..files {
        let (a, b) = (read_all(&from.store(), &digest, file), read_all(&to.store(), &digest, file));
        assert!(a.unwrap() == b.unwrap(), "file {file} of {digest}");
    }
}
