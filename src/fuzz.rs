//! Fuzz targets: the decoders of bytes that other programs or users have written. `tests/fuzz/` runs them under
//! libFuzzer; the unit tests replay the corpus there and changed inputs.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clones::recipe::{Facts, Recipe, Values, examine, plan};
use crate::control::{Channel, MountOptions, Request, Response, Snapshot, ledger};
use crate::memory::{FileFacts, Options};
use crate::progress::Silent;
use crate::store::fuzz::streams;
pub use crate::store::fuzz::{image, pack, placement};
use crate::store::{FileKind, Incoming, LoadRequest, Roles, Store, TemplateFile};
use crate::sys::memory::memfd;
use crate::units::{Bytes, HUGE_PAGE_SIZE, PAGE_SIZE};

/// A target: decodes bytes, and panics if the decoder violates its contract.
pub type Target = fn(&[u8]);

/// All targets, each with the name of its directory in `tests/fuzz/corpus/`.
pub const TARGETS: [(&str, Target); 7] = [
    ("image", image),
    ("placement", placement),
    ("pack", pack),
    ("stream", stream),
    ("object", object),
    ("recipe", recipe),
    ("control", control),
];

/// A stream, loaded into an empty store: a failed load leaves nothing in the store, and a successful load leaves all
/// templates.
///
/// # Panics
/// Panics if the load violates this, or if a temporary store cannot be created.
pub fn stream(data: &[u8]) {
    for bytes in streams(data) {
        load(&bytes);
    }
}

fn load(data: &[u8]) {
    let file = memfd::create("stream", Bytes::new(data.len() as u64)).expect("a memory file");
    let file = std::fs::File::from(file);
    file.write_all_at(data, 0).expect("a memory file is writable");
    let Ok(incoming) = Incoming::open(file, Path::new("stream"), None, None) else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Store::open_or_create(dir.path()).expect("an empty store");
    match store.load(incoming, &LoadRequest::default(), &Silent) {
        Ok(loaded) => {
            for template in loaded.templates {
                assert!(store.has(&template.digest));
            }
        }
        Err(_) => {
            assert_eq!(store.digests().expect("the store is readable"), []);
            assert!(store.pack_files().expect("the store is readable").is_empty());
        }
    }
}

/// The value of QEMU's `-object`.
///
/// # Panics
/// Panics if a layout breaks the rules of a mapping: its length, its page size or its alignment.
pub fn object(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(plan) = Options::parse(text).and_then(|options| options.plan()) else { return };
    for page_size in [PAGE_SIZE, HUGE_PAGE_SIZE] {
        for size in [0, PAGE_SIZE, 1 << 30] {
            let facts = FileFacts { size, page_size, regular: true };
            if let Ok(layout) = plan.layout(&facts) {
                let (length, align) = (layout.length.get(), layout.align.get());
                assert!(length >= plan.size.get() && length.is_multiple_of(page_size), "length {length:#x}");
                assert!(align.is_power_of_two() && align >= page_size, "alignment {align:#x}");
                drop(plan.check_mapped(&facts));
            }
        }
    }
}

/// A recipe that a user has edited, and the command line of a VM, one argument per line.
///
/// # Panics
/// Panics if the text of a recipe does not give the same recipe again, or if a planned command line has no RAM.
pub fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = |name: &str, kind| TemplateFile {
        name: name.to_owned(),
        kind,
        size: Bytes::new(PAGE_SIZE),
        data_bytes: Bytes::new(PAGE_SIZE),
    };
    let files = [file("memory", FileKind::Ram), file("rom", FileKind::Rom), file("state", FileKind::Blob)];
    let roles = Roles { memory: Some("memory".to_owned()), state: Some("state".to_owned()) };
    let paths = files.each_ref().map(|file| (file.name.clone(), format!("/m/{}", file.name)));
    let values = Values::new("web:1", &paths, &roles);
    if let Ok(recipe) = Recipe::edited(text, &files, &roles) {
        assert_eq!(Recipe::edited(&recipe.to_text(), &files, &roles).expect("the same recipe"), recipe);
        drop(recipe.arguments(&values));
    }
    let argv: Vec<String> = text.lines().map(str::to_owned).collect();
    let facts = Facts::default();
    if let Ok(examined) = examine(&argv, &facts) {
        assert_eq!(examined.error().is_none(), plan(&argv, &facts).is_ok());
        if examined.error().is_none() {
            assert!(!examined.plan.ram.is_empty());
            drop(Recipe::qemu("qemu".into(), "1".into(), examined.plan.argv).arguments(&values));
        }
    }
}

/// A message of the control socket, mount options, and the ledger of a dead supervisor.
///
/// # Panics
/// Panics if a decoded message cannot be encoded and decoded again.
pub fn control(data: &[u8]) {
    round_trip::<Request>(data);
    round_trip::<Response>(data);
    round_trip::<Snapshot>(data);
    if !data.is_empty() {
        receive(data);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let mut options = MountOptions::new("/mnt", "/store");
        if options.apply(text).is_ok() {
            let args = options.to_args();
            let again = MountOptions::from_args(args.iter().skip(1).cloned()).expect("the same options");
            assert_eq!(again.to_args(), args);
        }
    }
    for text in [data, data.get(ledger::HEAD_BYTES..).unwrap_or_default()] {
        let mut half = data.get(..16).map_or_else(|| vec![0; 16], <[u8]>::to_vec);
        half.extend_from_slice(blake3::hash(text).as_bytes());
        half.extend_from_slice(text);
        let file = memfd::create("ledger", Bytes::new(2 * ledger::HALF_BYTES)).expect("a memory file");
        let file = std::fs::File::from(file);
        file.write_all_at(&half, 0).expect("a memory file is writable");
        if let Some((sequence, found)) = ledger::newest(&file) {
            assert!(sequence % 2 == 0 && half[ledger::HEAD_BYTES..].starts_with(&found));
        }
    }
}

fn round_trip<T: Serialize + DeserializeOwned>(data: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<T>(data) {
        let encoded = serde_json::to_vec(&message).expect("a message has an encoding");
        serde_json::from_slice::<T>(&encoded).expect("an encoded message is a message");
    }
}

/// Receives the bytes as one packet of a control socket.
fn receive(data: &[u8]) {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket pair");
    if rustix::net::send(&theirs, data, rustix::net::SendFlags::DONTWAIT).is_ok() {
        let received = Channel::new(ours).receive::<Request>();
        assert_eq!(received.is_ok(), serde_json::from_slice::<Request>(data).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::PathBuf;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;

    /// Returns the committed inputs of a target. Cargo runs tests in the directory of the package, which user nobody
    /// can read even if a parent directory is private.
    fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let dir = Path::new("tests/fuzz/corpus").join(target);
        let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut inputs: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        inputs.sort();
        assert!(inputs.len() >= 10, "{target}: {} inputs", inputs.len());
        inputs
    }

    /// The inputs of the binary formats are those that this build encodes: they do not become useless when a format
    /// changes. With `STENCIL_UPDATE_CORPUS=1` the test writes them.
    #[test]
    fn the_corpus_has_the_encodings_of_this_build() {
        let update = std::env::var_os("STENCIL_UPDATE_CORPUS").is_some();
        for (target, name, bytes) in crate::store::fuzz::seeds() {
            let path = Path::new("tests/fuzz/corpus").join(target).join(name);
            if update {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, bytes).unwrap();
            } else {
                assert_eq!(fs::read(&path).unwrap(), bytes, "{}", path.display());
            }
        }
    }

    /// Without valid states in the corpus the decoder of the mount state would see invalid inputs only.
    #[test]
    fn the_corpus_has_valid_mount_states() {
        for name in ["ledger-snapshot", "ledger-memory"] {
            let bytes = fs::read(Path::new("tests/fuzz/corpus/control").join(name)).unwrap();
            serde_json::from_slice::<Snapshot>(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn replays_the_corpus() {
        for (name, target) in TARGETS {
            for (path, input) in corpus(name) {
                let replayed = catch_unwind(AssertUnwindSafe(|| target(&input)));
                assert!(replayed.is_ok(), "target {name} panics: {}", path.display());
            }
        }
    }

    /// One change of an input; positions are taken modulo the length.
    #[derive(Debug, Clone)]
    enum Change {
        Set(usize, u8),
        Insert(usize, Vec<u8>),
        Remove(usize, usize),
        Repeat(usize, usize),
        /// The rest of another input.
        Splice(usize, prop::sample::Index),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let at = any::<u16>().prop_map(usize::from);
        let byte = prop_oneof![any::<u8>(), prop::sample::select(b"\0\x01\x7f\x80\xff,=:{}[]\"'-0".to_vec())];
        let change = prop_oneof![
            4 => (at.clone(), byte).prop_map(|(at, byte)| Change::Set(at, byte)),
            1 => (at.clone(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, new)| Change::Insert(at, new)),
            1 => (at.clone(), 1..64usize).prop_map(|(at, length)| Change::Remove(at, length)),
            1 => (at.clone(), 1..64usize).prop_map(|(at, length)| Change::Repeat(at, length)),
            1 => (at, any::<prop::sample::Index>()).prop_map(|(at, other)| Change::Splice(at, other)),
        ];
        prop::collection::vec(change, 1..6)
    }

    fn changed(mut input: Vec<u8>, changes: &[Change], all: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
        for change in changes {
            let place = |at: usize| at % (input.len() + 1);
            match change {
                Change::Set(at, byte) => {
                    let at = place(*at);
                    if let Some(old) = input.get_mut(at) {
                        *old = *byte;
                    }
                }
                Change::Insert(at, new) => {
                    let at = place(*at);
                    input.splice(at..at, new.iter().copied());
                }
                Change::Remove(at, length) => {
                    let at = place(*at);
                    input.drain(at..(at + length).min(input.len()));
                }
                Change::Repeat(at, length) => {
                    let at = place(*at);
                    input.extend_from_within(at..(at + length).min(input.len()));
                }
                Change::Splice(at, other) => {
                    let at = place(*at);
                    input.truncate(at);
                    input.extend_from_slice(other.get(all).1.get(at..).unwrap_or_default());
                }
            }
        }
        input
    }

    /// `make soak` runs 100 times as many cases.
    #[test]
    fn survives_changed_inputs() {
        let soak = std::env::var_os("STENCIL_SOAK").is_some();
        for (name, target) in TARGETS {
            let inputs = corpus(name);
            // A load creates a store.
            let cases = if name == "stream" { 200 } else { 2000 };
            let config = Config {
                cases: if soak { 100 * cases } else { cases },
                failure_persistence: None,
                ..Config::default()
            };
            let strategy = (any::<prop::sample::Index>(), changes());
            let run = TestRunner::new(config).run(&strategy, |(from, changes)| {
                let input = changed(from.get(&inputs).1.clone(), &changes, &inputs);
                let replayed = catch_unwind(AssertUnwindSafe(|| target(&input)));
                prop_assert!(replayed.is_ok(), "input: \"{}\"", input.escape_ascii());
                Ok(())
            });
            assert!(run.is_ok(), "target {name}: {}", run.unwrap_err());
        }
    }
}
