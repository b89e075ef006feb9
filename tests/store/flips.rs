//! Flips every byte of a small store, one at a time: `verify` reports the flip or the byte has no meaning, no wrong
//! byte is read, no other template is lost, nothing panics, and importing the sources again repairs all damage.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::json;
use stencilfs::error::{Error, Result};
use stencilfs::progress::Silent;
use stencilfs::store::{
    BLOCK_SIZE, Collect, Digest, FileKind, ImportFile, ImportRequest, Policy, Scratch, Source, Store,
    TagName, TemplateRef, Verified,
};
use stencilfs::units::FileOffset;
use tempfile::TempDir;

use crate::support::host;
use crate::support::store::{random, stencil};

const BLOCK: usize = BLOCK_SIZE as usize;
const PACK_HEADER: u64 = 256;

/// An imported template.
struct Imported {
    request: ImportRequest,
    files: Vec<(String, FileKind, Vec<u8>)>,
    digest: Digest,
    policy: Policy,
    tag: TagName,
    packs: Vec<PathBuf>,
}

/// A store that stays undamaged, with the relative paths of its files and directories.
struct Sound {
    dir: TempDir,
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    templates: [Imported; 2],
}

/// A byte to damage.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a Path,
    at: u64,
    mask: u8,
    in_record: bool,
}

/// Creates a temporary directory, in RAM if possible: the commands after each flip call fsync.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// Returns compressible blocks, each with the given number of random bytes.
fn blocks(seed: u64, noise: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, noise) in (0..).zip(noise) {
        bytes.extend(random(seed + number, *noise));
        bytes.resize((number as usize + 1) * BLOCK, b'x');
    }
    bytes
}

impl Sound {
    fn new() -> Sound {
        let dir = scratch();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        let shared = blocks(10, &[20_000]);
        let first = [&shared[..], &vec![0; BLOCK], &blocks(20, &[9000, BLOCK])].concat();
        let second = [&blocks(30, &[12_000, 4000])[..], &shared].concat();
        let import = |tag: &str, compression: &str, memory: Vec<u8>, state: Option<Vec<u8>>| {
            let mut files = vec![("memory".to_owned(), FileKind::Ram, memory)];
            files.extend(state.map(|bytes| ("state".to_owned(), FileKind::Blob, bytes)));
            let source = |(name, kind, bytes): &(String, FileKind, Vec<u8>)| {
                let path = dir.path().join(format!("{}.{name}", Digest::of(tag.as_bytes()).short()));
                fs::write(&path, bytes).unwrap();
                ImportFile { name: name.clone(), kind: *kind, source: Source::Path(path) }
            };
            let tag: TagName = tag.parse().unwrap();
            let mut request = ImportRequest::new(Some(tag.clone()), files.iter().map(source).collect());
            request.compression = compression.parse().unwrap();
            request.mode = Some(0o440);
            request.labels =
                [("team", tag.name()), ("stage", "test")].map(|(k, v)| (k.into(), v.into())).into();
            request.recipe = Some(json!({"version": 1, "argv": ["-machine", tag.name()]}));
            let digest = store.import(request.clone(), &Silent).unwrap().digest;
            let template = store.template(&digest).unwrap();
            Imported {
                request,
                files,
                digest,
                policy: template.policy().clone(),
                tag,
                packs: template.packs().iter().map(|pack| pack.as_ref().to_owned()).collect(),
            }
        };
        let templates =
            [import("web:1", "lz4", first, Some(random(40, 3000))), import("db:2", "zstd", second, None)];
        let (mut files, mut directories) = (Vec::new(), Vec::new());
        list(&dir.path().join("store"), Path::new(""), &mut files, &mut directories);
        Sound { dir, files, directories, templates }
    }

    fn path(&self, file: &Path) -> PathBuf {
        self.dir.path().join("store").join(file)
    }

    /// Returns the place of every byte of the store, each with a mask: all bits at even offsets, one bit at odd
    /// offsets.
    fn places(&self) -> Vec<Place<'_>> {
        let mut places = Vec::new();
        for file in &self.files {
            let bytes = fs::read(self.path(file)).unwrap();
            let is_pack = file.extension().is_some_and(|e| e == "pack");
            let index = if is_pack { u64::from_le_bytes(bytes[72..80].try_into().unwrap()) } else { 0 };
            for at in 0..bytes.len() as u64 {
                let in_record = (PACK_HEADER..index).contains(&at);
                let mask = if at % 2 == 0 { 0xff } else { 1 << (random(at, 1)[0] % 8) };
                places.push(Place { file, at, mask, in_record });
            }
        }
        places
    }

    /// Recreates `dir` as a copy of this store with hard links; only the file to damage is copied.
    fn copy_to(&self, dir: &Path, damaged: &Path) {
        let _ = fs::remove_dir_all(dir);
        self.directories.iter().for_each(|folder| fs::create_dir(dir.join(folder)).unwrap());
        for file in &self.files {
            let (from, to) = (self.path(file), dir.join(file));
            match file == damaged {
                true => fs::copy(from, to).map(drop).unwrap(),
                false => fs::hard_link(from, to).unwrap(),
            }
        }
    }
}

fn list(dir: &Path, name: &Path, files: &mut Vec<PathBuf>, directories: &mut Vec<PathBuf>) {
    directories.push(name.to_owned());
    for entry in fs::read_dir(dir.join(name)).unwrap() {
        let name = name.join(entry.unwrap().file_name());
        match dir.join(&name).is_dir() {
            true => list(dir, &name, files, directories),
            false => files.push(name),
        }
    }
    files.sort();
}

impl Imported {
    /// Reads the template's files by block and by range: each read returns the right bytes or an error.
    fn read(&self, store: &Store) -> Result<()> {
        let template = store.template(&self.digest)?;
        let files: Vec<_> = template.files().iter().map(|f| (f.name.clone(), f.kind, f.size.get())).collect();
        let expected: Vec<_> = self.files.iter().map(|(n, k, b)| (n.clone(), *k, b.len() as u64)).collect();
        assert_eq!(files, expected);
        let policy = Policy { created: self.policy.created, ..template.policy().clone() };
        assert_eq!(policy, self.policy);
        let (mut scratch, mut block) = (Scratch::default(), vec![0xaa; BLOCK]);
        let mut result = Ok(());
        for (file, (_, _, bytes)) in self.files.iter().enumerate() {
            for (number, expected) in bytes.chunks(BLOCK).enumerate() {
                match template.read_block(file, number as u64, &mut scratch, &mut block) {
                    Ok(length) => {
                        assert!(block[..length] == *expected, "block {number} of file {file} is wrong")
                    }
                    Err(e) => result = Err(e),
                }
                // A part of the block.
                if let Some(from) = expected.len().checked_sub(1000) {
                    let offset = FileOffset::new((number * BLOCK + from) as u64);
                    match template.read_range(file, offset, &mut scratch, &mut block[..300]) {
                        Ok(()) => {
                            assert!(block[..300] == expected[from..from + 300], "a part at {from} is wrong")
                        }
                        Err(e) => result = Err(e),
                    }
                }
            }
        }
        result
    }

    /// Returns true if the file has data of this template.
    fn relies_on(&self, sound: &Sound, file: &Path) -> bool {
        let digest = self.digest.to_string();
        let in_tag = file == Path::new("tags").join(self.tag.name()).join(self.tag.tag());
        in_tag || file.iter().any(|part| part == digest.as_str()) || self.packs.contains(&sound.path(file))
    }
}

fn verify(store: &Store) -> Verified {
    store.verify(None, &AtomicBool::new(false), &Silent).expect("verify stopped")
}

fn assert_no_panic(error: &Error) {
    assert!(!error.to_string().contains("panicked"), "{error}");
}

/// Flips one byte, checks all commands on the store, and returns true if `verify` reported the flip.
fn flip(sound: &Sound, dir: &Path, place: Place<'_>, repair: bool) -> bool {
    let path = dir.join(place.file);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    let mut change = |mask: u8| {
        file.read_exact_at(&mut byte, place.at).unwrap();
        file.write_all_at(&[byte[0] ^ mask], place.at).unwrap();
    };
    change(place.mask);
    let store = Store::open(dir).expect("cannot open the store");
    let verified = verify(&store);
    let is_named = verified.damages.iter().any(|d| d.path == path);
    let is_harmful = verified.damages.iter().any(|d| !d.is_unused());
    assert!(is_named || verified.damages.is_empty(), "{verified:?}");
    for template in &sound.templates {
        let tag =
            store.tag(&template.tag).and_then(|_| store.resolve(&TemplateRef::Tag(template.tag.clone())));
        let read = template.read(&store);
        match (&tag, &read) {
            (Ok(digest), Ok(())) => assert_eq!(*digest, template.digest),
            _ => {
                assert!(
                    template.relies_on(sound, place.file),
                    "another template cannot be read: {tag:?} {read:?}"
                );
                assert!(is_named && is_harmful, "{tag:?} {read:?} {verified:?}");
                [tag.as_ref().err(), read.as_ref().err()].into_iter().flatten().for_each(assert_no_panic);
            }
        }
    }
    let stop = AtomicBool::new(false);
    let _ = store.usage(&stop, &Silent).inspect_err(assert_no_panic);
    let _ = store
        .collect(Collect { dry_run: Some(&[]), all: false }, &stop, &Silent)
        .inspect_err(assert_no_panic);
    if !repair {
        change(place.mask);
        return is_named;
    }
    for template in &sound.templates {
        let imported = store.import(template.request.clone(), &Silent).expect("cannot import again");
        assert_eq!(imported.digest, template.digest);
    }
    let store = Store::open(dir).unwrap();
    let left = verify(&store).damages;
    assert!(left.iter().all(|d| d.is_unused()), "{left:?}");
    for template in &sound.templates {
        template.read(&store).unwrap();
        assert_eq!(store.resolve(&TemplateRef::Tag(template.tag.clone())).unwrap(), template.digest);
    }
    sound.copy_to(dir, place.file);
    is_named
}

/// Flips these bytes, on all CPUs in parallel. Returns those that `verify` did not report.
fn flip_each<'a>(
    sound: &Sound,
    places: &[Place<'a>],
    repair: impl Fn(usize) -> bool + Sync,
) -> Vec<Place<'a>> {
    const BATCH: usize = 64;
    let next = AtomicUsize::new(0);
    let work = || {
        let (room, mut undetected) = (scratch(), Vec::new());
        let dir = room.path().join("store");
        loop {
            let start = next.fetch_add(BATCH, Ordering::Relaxed);
            for number in start..(start + BATCH).min(places.len()) {
                let place = places[number];
                if number == start || places[number - 1].file != place.file {
                    sound.copy_to(&dir, place.file);
                }
                match catch_unwind(AssertUnwindSafe(|| flip(sound, &dir, place, repair(number)))) {
                    Ok(true) => {}
                    Ok(false) => undetected.push(place),
                    Err(panic) => {
                        println!("{} at {}, mask {:#04x}:", place.file.display(), place.at, place.mask);
                        next.store(places.len(), Ordering::Relaxed);
                        resume_unwind(panic);
                    }
                }
            }
            if start >= places.len() {
                return undetected;
            }
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..thread::available_parallelism().map_or(1, usize::from)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// Panics unless all undetected flips are in records and few: only compressed data has bits without a meaning.
fn assert_in_records(undetected: &[Place<'_>], flips: usize) {
    for place in undetected {
        assert!(place.in_record, "the flip in {} at {} was not reported", place.file.display(), place.at);
    }
    assert!(undetected.len() < flips / 50, "{} of {flips} flips were not reported", undetected.len());
}

#[test]
fn soak_every_flipped_byte_is_reported_and_repaired() {
    let _host = host::shared();
    let sound = Sound::new();
    let all = sound.places();
    // A sparse sample of record bytes, a denser one of the rest: each file is covered.
    let (records, rest) = host::rounds((4001, 97), (1, 1));
    let mut counts = [0; 2];
    let mut is_wanted = |place: &&Place<'_>| {
        let count = &mut counts[usize::from(place.in_record)];
        *count += 1;
        *count % if place.in_record { records } else { rest } == 0
    };
    let places: Vec<Place<'_>> = all.iter().filter(|place| is_wanted(place)).copied().collect();
    // The repair does not depend on the byte within a record: a sample is enough in the soak.
    let repair = |number: usize| !host::soaking() || !places[number].in_record || number.is_multiple_of(16);
    let begun = std::time::Instant::now();
    let undetected = flip_each(&sound, &places, repair);
    assert_in_records(&undetected, places.len());
    println!(
        "{} of {} flips in {} files, {} undetected, {:?}",
        places.len(),
        all.len(),
        sound.files.len(),
        undetected.len(),
        begun.elapsed()
    );
}

/// A sample of flips, checked with the commands instead of the library.
#[test]
fn commands_fail_cleanly_on_a_store_with_a_flipped_byte() {
    let sound = Sound::new();
    let room = scratch();
    let dir = room.path().join("store");
    let [first, second] = &sound.templates;
    let all = sound.places();
    for place in all.iter().skip(40).step_by(all.len() / 24) {
        sound.copy_to(&dir, place.file);
        let file = File::options().read(true).write(true).open(dir.join(place.file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, place.at).unwrap();
        file.write_all_at(&[byte[0] ^ place.mask], place.at).unwrap();
        let run = |words: &[&str]| {
            let output = stencil(room.path(), words).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let code = output.status.code().unwrap_or(-1);
            let what = format!("{} at {}: {words:?}: {text}", place.file.display(), place.at);
            assert!([0, 1, 3, 4].contains(&code) && !text.contains("panicked"), "{code}: {what}");
            (code, what)
        };
        let (verified, what) = run(&["verify"]);
        for words in [&["ls"][..], &["du"], &["gc", "--dry-run"], &["gc", "--untagged", "--dry-run"]] {
            run(words);
        }
        for (template, name) in [(first, "web:1"), (second, "db:2")] {
            let out = room.path().join("out");
            let (code, _) = run(&["export", name, out.to_str().unwrap()]);
            assert_eq!(code == 0, out.exists(), "{what}");
            if code == 0 {
                assert!(fs::read(&out).unwrap() == template.files[0].2, "{what}");
                fs::remove_file(&out).unwrap();
            } else {
                assert_eq!(verified, 3, "{what}");
            }
            run(&["save", name, "-o", out.to_str().unwrap()]);
            let _ = fs::remove_file(&out);
        }
    }
}
