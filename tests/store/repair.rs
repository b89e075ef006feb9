//! Importing the same memory again repairs a store: afterwards `verify` finds no damage in referenced data, for every
//! kind of damage, also in blocks that several templates share.

use std::fs;
use std::path::{Path, PathBuf};

use stencilfs::store::Digest;

use crate::support::store::{Fixture, random, read_all};

const SHARED: usize = 4 << 16;

/// The sources of two templates that begin with the same blocks.
fn sources() -> [(&'static str, Vec<u8>); 2] {
    let shared = random(1, SHARED);
    [("a", [&shared[..], &random(2, 1 << 16)].concat()), ("b", [&shared[..], &random(3, 2 << 16)].concat())]
}

fn import_both(fixture: &Fixture) -> [Digest; 2] {
    sources().map(|(name, bytes)| fixture.import(name, &bytes).digest)
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// Returns the pack with the blocks that both templates share.
fn shared_pack(fixture: &Fixture) -> PathBuf {
    let length = |pack: &PathBuf| fs::metadata(pack).unwrap().len();
    fixture.files("packs").into_iter().max_by_key(length).unwrap()
}

fn assert_both_are_sound(fixture: &Fixture, digests: &[Digest; 2]) {
    fixture.run(&["verify"]).ok();
    for ((name, bytes), digest) in sources().iter().zip(digests) {
        assert!(read_all(&fixture.store(), digest, 0).unwrap() == *bytes, "{name}");
    }
}

/// The order of two records of a block depends on random pack names: several rounds cover both orders.
const ROUNDS: usize = 8;

#[test]
fn importing_both_templates_repairs_a_shared_damaged_block() {
    for round in 0..ROUNDS {
        let fixture = Fixture::new();
        let digests = import_both(&fixture);
        flip(&shared_pack(&fixture), 5000);
        assert_eq!(fixture.run(&["verify"]).code, 3, "round {round}");
        import_both(&fixture);
        assert_both_are_sound(&fixture, &digests);
        let packs = fixture.files("packs");
        import_both(&fixture);
        assert_eq!(fixture.files("packs"), packs, "sound blocks were stored again");
    }
}

#[test]
fn loading_both_templates_repairs_a_shared_damaged_block() {
    let from = Fixture::new();
    import_both(&from);
    let streams = ["a", "b"].map(|name| {
        let path = from.path(&format!("{name}.stencil"));
        from.run(&["save", name, "-o", path.to_str().unwrap()]).ok();
        path
    });
    for round in 0..ROUNDS {
        let fixture = Fixture::new();
        let digests = import_both(&fixture);
        flip(&shared_pack(&fixture), 5000);
        assert_eq!(fixture.run(&["verify"]).code, 3, "round {round}");
        let repaired: Vec<u64> = (streams.iter())
            .map(|stream| {
                let loaded = fixture.run(&["--json", "load", "-i", stream.to_str().unwrap()]).ok().json();
                loaded["repaired_blocks"].as_u64().unwrap()
            })
            .collect();
        assert_eq!(repaired, [1, 1], "both templates referenced the damaged record");
        assert_both_are_sound(&fixture, &digests);
    }
}

/// Damages each kind of data that the two templates need.
#[test]
fn importing_both_templates_repairs_every_kind_of_damage() {
    type Damage = fn(&Fixture, &[Digest; 2]);
    let damages: [(&str, Damage); 13] = [
        ("record", |f, _| flip(&shared_pack(f), 5000)),
        ("pack header", |f, _| flip(&shared_pack(f), 60)),
        ("pack version", |f, _| flip(&shared_pack(f), 8)),
        ("pack features", |f, _| flip(&shared_pack(f), 32)),
        ("pack index", |f, _| {
            let pack = shared_pack(f);
            flip(&pack, fs::metadata(&pack).unwrap().len() as usize - 20);
        }),
        ("missing pack", |f, _| fs::remove_file(shared_pack(f)).unwrap()),
        ("missing pack directory", |f, _| fs::remove_dir_all(f.path("store/packs")).unwrap()),
        ("image", |f, d| flip(&image(f, &d[0]).join("image"), 300)),
        ("placement", |f, d| flip(&image(f, &d[1]).join("placement"), 300)),
        ("placement version", |f, d| flip(&image(f, &d[1]).join("placement"), 8)),
        ("policy", |f, d| flip(&image(f, &d[0]).join("policy"), 100)),
        ("tag", |f, _| flip(&f.path("store/tags/b/latest"), 20)),
        ("store header", |f, _| flip(&f.path("store/format"), 60)),
    ];
    for (what, damage) in damages {
        let fixture = Fixture::new();
        let digests = import_both(&fixture);
        damage(&fixture, &digests);
        assert_eq!(fixture.run(&["verify"]).code, 3, "{what}");
        import_both(&fixture);
        assert_both_are_sound(&fixture, &digests);
        // A damaged record without references is reported until gc removes its pack.
        fixture.run(&["gc"]).ok();
        let verified = fixture.run(&["--json", "verify"]).ok().json();
        let left = verified["damages"].as_array().unwrap();
        assert!(left.is_empty() || what == "record" && left.len() == 1, "{what}: {verified:#}");
        assert_both_are_sound(&fixture, &digests);
    }
}

fn image(fixture: &Fixture, digest: &Digest) -> PathBuf {
    fixture.path("store/images").join(digest.to_string())
}

/// The secret in the header keys all inode numbers: one damaged sector must not lose it.
#[test]
fn a_damaged_header_is_read_from_its_copy() {
    let fixture = Fixture::new();
    let [digest, _] = import_both(&fixture);
    let (secret, id) = (fixture.store().secret(), fixture.store().id());
    for name in ["format", "format.copy"] {
        let path = fixture.path("store").join(name);
        let sound = fs::read(&path).unwrap();
        let damages: [&dyn Fn(); 4] =
            [&|| flip(&path, 60), &|| flip(&path, 8), &|| fs::write(&path, &sound[..100]).unwrap(), &|| {
                fs::remove_file(&path).unwrap()
            }];
        for damage in damages {
            damage();
            let store = fixture.store();
            assert_eq!((store.secret(), store.id()), (secret, id.clone()));
            assert!(read_all(&store, &digest, 0).unwrap() == sources()[0].1);
            let verified = fixture.run(&["verify"]);
            assert_eq!(verified.code, 3, "{verified:?}");
            assert!(verified.stdout.contains(path.to_str().unwrap()), "{verified:?}");
            import_both(&fixture);
            fixture.run(&["verify"]).ok();
            assert!(fs::read(&path).unwrap() == sound);
        }
    }
    // The header of a newer Stencil is not damage: the copy is not read instead.
    let path = fixture.path("store/format");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    let sum = blake3::hash(&bytes[..128]);
    bytes[128..].copy_from_slice(sum.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let refused = fixture.run(&["ls"]);
    assert!(refused.code == 1 && refused.stderr.contains("newer Stencil"), "{refused:?}");
}
