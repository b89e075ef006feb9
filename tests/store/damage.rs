//! Damage anywhere in a store is found and reported, no wrong byte leaves the store, and importing the source again
//! repairs it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stencilfs::error::Code;
use stencilfs::progress::Silent;
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch};
use stencilfs::units::FileOffset;

use crate::support::host;
use crate::support::store::{Fixture, guest_like, random, read_all};

/// Creates a store with two templates of different codecs that share blocks.
fn fixture() -> (Fixture, Vec<(String, Digest, Vec<u8>)>) {
    let fixture = Fixture::new();
    let first = guest_like(1, 5 << 18);
    let second = [&first[..1 << 19], &guest_like(2, 1 << 19)[..], &random(9, 70_000)].concat();
    let mut templates = Vec::new();
    for (name, bytes, codec) in [("first", first, "lz4"), ("second", second, "zstd")] {
        let mut request = fixture.request(name, &bytes);
        request.compression = codec.parse().unwrap();
        let digest = fixture.store().import(request, &Silent).unwrap().digest;
        templates.push((name.to_owned(), digest, bytes));
    }
    (fixture, templates)
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

/// Reads all blocks; panics unless each is right or fails with a damage error. Returns the number of errors.
fn assert_no_wrong_byte(fixture: &Fixture, templates: &[(String, Digest, Vec<u8>)]) -> usize {
    let mut errors = 0;
    let Ok(store) = stencilfs::store::Store::open(&fixture.path("store")) else { return 1 };
    for (name, digest, bytes) in templates {
        let template = match store.template(digest) {
            Ok(template) => template,
            Err(e) => {
                assert!(matches!(e.code(), Code::Damage | Code::Failed), "{name}: {e}");
                errors += 1;
                continue;
            }
        };
        let mut scratch = Scratch::default();
        let mut block = vec![0xaa; BLOCK_SIZE as usize];
        for (number, expected) in bytes.chunks(BLOCK_SIZE as usize).enumerate() {
            match template.read_block(0, number as u64, &mut scratch, &mut block) {
                Ok(length) => assert!(block[..length] == *expected, "{name}: block {number} is wrong"),
                Err(e) => {
                    assert!(matches!(e.code(), Code::Damage | Code::Failed), "{name}: {e}");
                    errors += 1;
                }
            }
            // An unaligned part.
            let from = (number * 977) % (expected.len() - 300);
            let offset = FileOffset::new(number as u64 * BLOCK_SIZE + from as u64);
            if template.read_range(0, offset, &mut scratch, &mut block[..300]).is_ok() {
                assert!(
                    block[..300] == expected[from..from + 300],
                    "{name}: a part of block {number} is wrong"
                );
            }
        }
    }
    errors
}

/// Returns positions to damage in every file of the store: densely at the start and end, sampled in between.
fn places(fixture: &Fixture) -> Vec<(PathBuf, u64)> {
    let mut places = Vec::new();
    for path in fixture.files("") {
        let length = fs::metadata(&path).unwrap().len();
        let step = (length / 40).max(1);
        let head = (0..length.min(400)).step_by(9);
        let tail = (length.saturating_sub(200)..length).step_by(11);
        places
            .extend(head.chain((0..length).step_by(step as usize)).chain(tail).map(|at| (path.clone(), at)));
    }
    places
}

#[test]
fn soak_any_flipped_bit_is_reported_and_never_served() {
    let (fixture, templates) = fixture();
    let mut undetected = Vec::new();
    let places = places(&fixture);
    assert!(places.len() > 400, "{}", places.len());
    for (path, at) in places.iter().step_by(host::rounds(3, 1)) {
        flip(path, *at);
        let errors = assert_no_wrong_byte(&fixture, &templates);
        let verified = stencilfs::store::Store::open(&fixture.path("store"))
            .and_then(|store| store.verify(None, &Default::default(), &Silent));
        match verified {
            Ok(verified) => {
                let named = verified.damages.iter().any(|d| d.path == *path);
                if !named {
                    undetected.push((path.clone(), *at));
                }
                if errors > 0 {
                    assert!(named, "{} at {at}: {:?}", path.display(), verified.damages);
                }
            }
            Err(e) => assert_eq!(e.path(), Some(path.as_path()), "{e}"),
        }
        flip(path, *at);
    }
    // Only compressed data has bits without a meaning.
    for (path, at) in &undetected {
        assert!(
            path.extension().is_some_and(|e| e == "pack"),
            "the flip in {} at {at} was not reported",
            path.display()
        );
    }
    assert!(
        undetected.len() < places.len() / 50,
        "{} of {} flips not reported: {undetected:?}",
        undetected.len(),
        places.len()
    );
    assert_eq!(assert_no_wrong_byte(&fixture, &templates), 0);
}

/// With the commands instead of the library: the exit code is 3; `verify` reports pack, offset, template and file; a
/// failed export leaves OUT as it was.
#[test]
fn verify_reports_damage_and_export_writes_no_output() {
    let (fixture, templates) = fixture();
    let pack = fixture.files("packs")[0].clone();
    flip(&pack, 5000);
    let verify = fixture.run(&["verify"]);
    assert_eq!(verify.code, 3, "{verify:?}");
    assert!(
        verify.stdout.contains(pack.to_str().unwrap()) && verify.stdout.contains("offset "),
        "{verify:?}"
    );
    let json = fixture.run(&["verify", "--json"]);
    assert_eq!(json.code, 3);
    let damages = json.json()["damages"].as_array().unwrap().clone();
    assert_eq!(damages.len(), 1, "{damages:?}");
    let offset = damages[0]["offset"].as_u64().unwrap();
    assert!(offset <= 5000 && 5000 < offset + 65536 + 544, "{damages:?}");
    let affected: Vec<&str> =
        damages[0]["affects"].as_array().unwrap().iter().map(|a| a["digest"].as_str().unwrap()).collect();
    let mut damaged = 0;
    for (name, digest, bytes) in &templates {
        let out = fixture.path("out");
        fs::write(&out, "before").unwrap();
        let export = fixture.run(&["export", "--force", name, out.to_str().unwrap()]);
        let single = fixture.run(&["verify", name]).code;
        if affected.contains(&digest.to_string().as_str()) {
            damaged += 1;
            assert_eq!((export.code, single), (3, 3), "{export:?}");
            assert!(export.stderr.contains(pack.to_str().unwrap()), "{export:?}");
            // The existing file is unchanged.
            assert_eq!(fs::read(&out).unwrap(), b"before");
        } else {
            assert_eq!((export.code, single), (0, 0), "{export:?}");
            assert!(fs::read(&out).unwrap() == *bytes);
        }
        let fresh = fixture.path("fresh");
        let export = fixture.run(&["export", name, fresh.to_str().unwrap()]);
        assert_eq!(export.code == 0, fresh.exists());
        let _ = fs::remove_file(&fresh);
    }
    assert!(damaged > 0);
    let left: Vec<_> = fs::read_dir(fixture.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains(".stencil-")), "{left:?}");
}

#[test]
fn a_truncated_pack_loses_only_its_tail() {
    let (fixture, templates) = fixture();
    let pack = fixture.files("packs").into_iter().max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let whole = fs::read(&pack).unwrap();
    for keep in [0, 1, 100, 255, 256, 4096, whole.len() / 2, whole.len() - 1] {
        fs::write(&pack, &whole[..keep]).unwrap();
        let errors = assert_no_wrong_byte(&fixture, &templates);
        if keep == whole.len() / 2 {
            let blocks: usize = templates.iter().map(|t| t.2.len().div_ceil(65536)).sum();
            assert!(errors > 0 && errors < blocks, "{errors} of {blocks}");
        }
        let verify = fixture.run(&["verify"]);
        assert_eq!(verify.code, 3, "{keep}: {verify:?}");
        assert!(verify.stdout.contains(pack.to_str().unwrap()), "{verify:?}");
    }
    fs::remove_file(&pack).unwrap();
    assert!(assert_no_wrong_byte(&fixture, &templates) > 0);
    let verify = fixture.run(&["verify"]);
    assert_eq!(verify.code, 3);
    assert!(verify.stdout.contains("missing"), "{verify:?}");
    fs::write(&pack, &whole).unwrap();
    fixture.run(&["verify"]).ok();
}

#[test]
fn swapped_packs_and_swapped_tables_are_reported() {
    let (fixture, templates) = fixture();
    let packs = fixture.files("packs");
    assert!(packs.len() >= 2);
    let swap = |a: &Path, b: &Path| {
        let between = fixture.path("between");
        fs::rename(a, &between).unwrap();
        fs::rename(b, a).unwrap();
        fs::rename(&between, b).unwrap();
    };
    let folders: Vec<PathBuf> =
        templates.iter().map(|t| fixture.path("store/images").join(t.1.to_string())).collect();
    let pairs = [
        (packs[0].clone(), packs[1].clone()),
        (folders[0].join("image"), folders[1].join("image")),
        (folders[0].join("placement"), folders[1].join("placement")),
        (folders[0].clone(), folders[1].clone()),
    ];
    for (a, b) in pairs {
        swap(&a, &b);
        assert!(assert_no_wrong_byte(&fixture, &templates) > 0, "{}", a.display());
        let verify = fixture.run(&["verify"]);
        assert_eq!(verify.code, 3, "{}: {verify:?}", a.display());
        assert!([&a, &b].iter().all(|p| verify.stdout.contains(p.to_str().unwrap())), "{verify:?}");
        swap(&a, &b);
    }
    fixture.run(&["verify"]).ok();
}

/// Sectors of zeros, as after a lost write, in tables that are longer than the part that is checked when a template is
/// opened: without a check of the table, a hash of zeros would read as a zero block.
#[test]
fn zeroed_table_sectors_are_not_read_as_zero_blocks() {
    const SIZE: u64 = 512 << 20;
    let fixture = Fixture::new();
    let source = fixture.path("source");
    let file = fs::File::create(&source).unwrap();
    file.set_len(SIZE).unwrap();
    let blocks: Vec<u64> = (0..SIZE / BLOCK_SIZE).step_by(17).collect();
    for block in &blocks {
        file.write_all_at(&block.to_le_bytes(), block * BLOCK_SIZE + 8).unwrap();
    }
    fixture.run(&["import", source.to_str().unwrap(), "a"]).ok();
    let digest = fixture.store().tags().unwrap()[0].digest;
    let folder = fixture.path("store/images").join(digest.to_string());
    for name in ["image", "placement"] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        for sector in (0..whole.len() / 512).step_by(37) {
            let mut bytes = whole.clone();
            bytes[sector * 512..][..512].fill(0);
            fs::write(&path, &bytes).unwrap();
            let Ok(template) = fixture.store().template(&digest) else { continue };
            let (mut scratch, mut out) = (Scratch::default(), vec![0; BLOCK_SIZE as usize]);
            for block in &blocks {
                if template.read_block(0, *block, &mut scratch, &mut out).is_ok() {
                    assert_eq!(out[8..16], block.to_le_bytes(), "{name}, sector {sector}, block {block}");
                }
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    fixture.run(&["verify"]).ok();
}

#[test]
fn importing_again_repairs_damage() {
    let (fixture, templates) = fixture();
    let victims: Vec<PathBuf> = fixture.files("packs").into_iter().chain(fixture.files("images")).collect();
    for victim in victims {
        for how in ["flip", "cut", "remove"] {
            if !victim.exists() {
                continue;
            }
            match how {
                "flip" => flip(&victim, fs::metadata(&victim).unwrap().len() / 2),
                "cut" => {
                    let bytes = fs::read(&victim).unwrap();
                    fs::write(&victim, &bytes[..bytes.len() / 3]).unwrap();
                }
                _ => fs::remove_file(&victim).unwrap(),
            }
            for (name, digest, bytes) in &templates {
                assert_eq!(fixture.import(name, bytes).digest, *digest);
                assert!(
                    read_all(&fixture.store(), digest, 0).unwrap() == *bytes,
                    "{how} {}",
                    victim.display()
                );
            }
            // The rest of the old pack is reported, but as unused.
            let verify = fixture.run(&["verify"]);
            assert_eq!(verify.code, 0, "{how} {}: {verify:?}", victim.display());
        }
    }
}

/// A reader that announced more blocks reads several records at once. The records before a cut stay readable, and a
/// record that was repaired is read again.
#[test]
fn a_run_of_records_fails_only_where_it_is_damaged() {
    let _host = host::shared();
    let fixture = Fixture::new();
    let bytes = random(4, 16 * BLOCK_SIZE as usize);
    let digest = fixture.import("a", &bytes).digest;
    let pack = fixture.files("packs").remove(0);
    let mut block = vec![0; BLOCK_SIZE as usize];
    let mut good = |scratch: &mut Scratch, numbers: std::ops::Range<u64>| -> Vec<bool> {
        let template = fixture.store().template(&digest).unwrap();
        let read = |number: u64| {
            scratch.announce(15 - number);
            let done = template.read_block(0, number, scratch, &mut block).is_ok();
            let start = (number * BLOCK_SIZE) as usize;
            assert!(!done || block == bytes[start..start + BLOCK_SIZE as usize], "block {number} is wrong");
            done
        };
        numbers.map(read).collect()
    };
    assert_eq!(good(&mut Scratch::default(), 0..16), [true; 16]);
    // Raw records begin behind the header of 256 bytes.
    let at = 256 + 9 * BLOCK_SIZE + 100;
    flip(&pack, at);
    let damaged = [[true; 9].as_slice(), &[false], &[true; 6]].concat();
    assert_eq!(good(&mut Scratch::default(), 0..16), damaged);
    let mut scratch = Scratch::default();
    assert_eq!(good(&mut scratch, 8..10), [true, false]);
    flip(&pack, at);
    assert_eq!(good(&mut scratch, 9..10), [true]);
    let whole = fs::read(&pack).unwrap();
    fs::File::options().write(true).open(&pack).unwrap().set_len(at).unwrap();
    assert_eq!(good(&mut Scratch::default(), 0..16), [[true; 9].as_slice(), &[false; 7]].concat());
    fs::write(&pack, whole).unwrap();
}
