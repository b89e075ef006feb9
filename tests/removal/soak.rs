//! rm, gc, imports and launches at the same time: no launch sees files of two versions, no block is missing, running
//! clones are unaffected, and the space of removed templates is freed.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use stencilfs::memory::{Backend, Options};
use stencilfs::progress::Silent;
use stencilfs::store::{FileKind, ImportFile, ImportRequest, Source, Store};
use stencilfs::units::MemoryOffset;

use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::store::random;

const BLOCK: usize = 64 << 10;

/// Memory and state of one version start with the same 16 bytes, which each clone compares.
#[test]
fn soak_launches_never_mix_versions_while_tags_move() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let store = Store::open(&world.store_dir()).unwrap();
    let digests: Vec<_> = (0..4u64)
        .map(|version| {
            let mut memory = random(version, 4 * BLOCK);
            memory[..16].copy_from_slice(format!("version {version:08}").as_bytes());
            let source = |name: &str, bytes: &[u8]| {
                let path = world.dir().join(format!("{name}-{version}"));
                fs::write(&path, bytes).unwrap();
                Source::Path(path)
            };
            let file = |name: &str, kind, bytes: &[u8]| ImportFile {
                name: name.into(),
                kind,
                source: source(name, bytes),
            };
            let state = memory[..5000].to_vec();
            let files = vec![file("memory", FileKind::Ram, &memory), file("state", FileKind::Blob, &state)];
            store.import(ImportRequest::new(Some("web:1".parse().unwrap()), files), &Silent).unwrap().digest
        })
        .collect();
    let moves: u64 = host::rounds(40, 500);
    let (done, moved, launches) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let _ends = SetOnDrop(&done);
                // Reads both files through the paths of the placeholders, one after the other.
                let check = "a=$(head -c 16 {memory}); sleep 0.02; b=$(head -c 16 {state}); \
                             test -n \"$a\" && test \"$a\" = \"$b\" || { echo \"$a and $b\" >&2; exit 9; }; \
                             echo ready >&$STENCIL_NOTIFY";
                while !done.load(Ordering::Relaxed) {
                    world
                        .stencil(&[
                            "clone", "web:1", "--wait", "--ready", "notify", "--", "bash", "-c", check,
                        ])
                        .ok();
                    launches.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _ends = SetOnDrop(&done);
        let tag = "web:1".parse().unwrap();
        let enough = || moved.load(Ordering::Relaxed) >= moves && launches.load(Ordering::Relaxed) >= 10;
        while !enough() && !done.load(Ordering::Relaxed) {
            let at = moved.fetch_add(1, Ordering::Relaxed);
            store.set_tag(&tag, &digests[at as usize % digests.len()]).unwrap();
            // Several moves happen during each launch.
            thread::sleep(std::time::Duration::from_millis(15));
        }
    });
    let (moved, launches) = (moved.into_inner(), launches.into_inner());
    host::soaking().then(|| println!("{moved} moves, {launches} launches"));
}

type Contents = Mutex<HashMap<String, Arc<Vec<u8>>>>;

/// Maps a template by its name and compares the first half MiB, then, 60 ms later, every byte. Returns false if there
/// is no such template.
fn map_and_compare(world: &TestMount, name: &str, contents: &Contents) -> bool {
    let link = world.mountpoint().join("templates").join(name).join("latest");
    let Ok(target) = fs::read_link(&link) else { return false };
    let digest = target.file_name().unwrap().to_str().unwrap().to_owned();
    let path = world.file(&digest, "memory");
    let expected = Arc::clone(&contents.lock().unwrap()[&digest]);
    let object = format!(
        "memory-backend-file,id=m,size={},mem-path={},share=off,readonly=on,rom=off",
        expected.len(),
        path.display()
    );
    let backend = match Backend::create(&Options::parse(&object).unwrap().plan().unwrap()) {
        Ok(backend) => backend,
        Err(error) => {
            assert!(error.to_string().contains("No such file"), "{error}");
            return false;
        }
    };
    let mut bytes = vec![0; expected.len()];
    for (part, pause) in [(8 * BLOCK, 60), (expected.len(), 0)] {
        backend.read_at(MemoryOffset::new(0), &mut bytes[..part]).unwrap();
        assert!(bytes[..part] == expected[..part], "{digest}");
        thread::sleep(std::time::Duration::from_millis(pause));
    }
    true
}

#[test]
fn soak_rm_and_gc_keep_launches_and_imports_intact() {
    const NAMES: u64 = 6;
    let _host = host::shared();
    for serve in ["decode", "auto"] {
        let world = TestMount::new(serve);
        let store = Store::open(&world.store_dir()).unwrap();
        let contents = Contents::default();
        let common = random(77, 4 * BLOCK);
        let (done, serial) = (AtomicBool::new(false), AtomicU64::new(0));
        let (mapped, launched, imported) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        // The contents by digest, for the `cmp` of launched clones.
        let expected_files = world.dir().join("contents");
        fs::create_dir(&expected_files).unwrap();
        let import = |name: &str| {
            let number = serial.fetch_add(1, Ordering::Relaxed);
            // Contents repeat, so that freed blocks are needed again.
            let bytes = [&random(1000 + number % 40, 12 * BLOCK)[..], &common].concat();
            let source = world.dir().join(format!("source-{number}"));
            fs::write(&source, &bytes).unwrap();
            let digest_of = |report: &serde_json::Value| report["digest"].as_str().unwrap().to_owned();
            // `contents` must have the digest before the tag exists, because mappers find the template by its tag. An
            // import into a separate store computes the digest.
            let scratch = Store::open_or_create(&world.dir().join("digests")).unwrap();
            let file =
                |path| ImportFile { name: "memory".into(), kind: FileKind::Ram, source: Source::Path(path) };
            let request =
                |tag: &str| ImportRequest::new(Some(tag.parse().unwrap()), vec![file(source.clone())]);
            let digest = scratch.import(request("x"), &Silent).unwrap().digest.to_string();
            contents.lock().unwrap().insert(digest.clone(), Arc::new(bytes));
            let kept = expected_files.join(&digest);
            fs::rename(&source, &kept).unwrap();
            let report = world.json(&["import", kept.to_str().unwrap(), name]);
            assert_eq!(digest_of(&report), digest);
            imported.fetch_add(1, Ordering::Relaxed);
        };
        import("kept");
        let compare = format!(
            "cat {{memory}} >/dev/null && sleep 0.05 && cmp {{memory}} {}/$STENCIL_TEMPLATE && echo x >&$STENCIL_NOTIFY",
            expected_files.display()
        );
        let rounds: u64 = host::rounds(20, 300);
        let (mut gone, mut used, mut missing) = (0, 0, 0);
        thread::scope(|scope| {
            for importer in 0..4u64 {
                let (import, done) = (&import, &done);
                scope.spawn(move || {
                    let mut turn = importer;
                    while !done.load(Ordering::Relaxed) {
                        import(&format!("t{}", turn % NAMES));
                        turn += 5;
                    }
                });
            }
            for launcher in 0..8u64 {
                let (world, compare, contents, done, mapped, launched) =
                    (&world, &compare, &contents, &done, &mapped, &launched);
                scope.spawn(move || {
                    let mut turn = launcher;
                    while !done.load(Ordering::Relaxed) {
                        let name = format!("t{}", turn % NAMES);
                        turn += 1;
                        if launcher < 6 {
                            let found = map_and_compare(world, &name, contents);
                            mapped.fetch_add(u64::from(found), Ordering::Relaxed);
                            continue;
                        }
                        let run = world.stencil(&[
                            "clone", &name, "--wait", "--ready", "notify", "--", "bash", "-c", compare,
                        ]);
                        assert!([0, 4].contains(&run.code), "{run:?}");
                        launched.fetch_add(u64::from(run.code == 0), Ordering::Relaxed);
                    }
                });
            }
            let _ends = SetOnDrop(&done);
            for round in 0..rounds * 10 {
                // On a loaded host more rounds may be necessary until all have made progress.
                let least = gone.min(launched.load(Ordering::Relaxed)).min(mapped.load(Ordering::Relaxed));
                if round >= rounds && used > 0 && least > rounds / 10 {
                    break;
                }
                let run = world.stencil(&["rm", &format!("t{}", round % NAMES)]);
                match run.code {
                    0 => gone += 1,
                    4 => missing += 1,
                    5 => used += 1,
                    _ => panic!("{run:?}"),
                }
                if round % 2 == 1 {
                    world.stencil(&["gc"]).ok();
                }
            }
        });
        for count in [&imported, &mapped, &launched] {
            assert!(count.load(Ordering::Relaxed) > rounds / 10, "{imported:?} {mapped:?} {launched:?}");
        }
        assert!(gone > rounds / 10 && used > 0, "{gone} removed, {used} in use, {missing} missing");
        host::soaking().then(|| {
            println!(
                "{serve}: {rounds} rounds: {gone} removed, {used} in use, {missing} missing; \
                 {imported:?} imports, {mapped:?} mappings, {launched:?} launches"
            )
        });
        world.stencil(&["verify"]).ok();
        for counter in ["damaged", "failed"] {
            assert_eq!(world.counter(counter), 0, "{counter}");
        }
        let tags = store.tags().unwrap();
        for tag in tags.iter().filter(|t| t.name != "kept") {
            world.stencil(&["rm", &format!("{}:{}", tag.name, tag.tag)]).ok();
        }
        world.stencil(&["gc", "--untagged"]).ok();
        world.stencil(&["gc"]).ok();
        world.stencil(&["verify"]).ok();
        let totals = world.json(&["du"])["totals"].clone();
        let kept = 16 * BLOCK as u64;
        let unique = totals["unique_bytes"].as_u64().unwrap();
        assert!((kept..kept + kept / 20).contains(&unique), "{totals:#}");
        assert!(totals["dead_bytes"].as_u64().unwrap() <= kept, "{totals:#}");
        assert_eq!(totals["session_bytes"], 0);
        let packs = run("du", &["-s", "--block-size=1", world.store_dir().join("packs").to_str().unwrap()]);
        let packs: u64 = packs.split_whitespace().next().unwrap().parse().unwrap();
        assert!(packs < 3 * kept, "{packs}");
    }
}
