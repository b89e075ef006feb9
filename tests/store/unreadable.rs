//! An unreadable template or file does not hide others and can be removed, but not while it may be in use.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::{Fixture, random};

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// The table is damaged beyond the part that is checked at open: the damage appears only during the count.
#[test]
fn du_counts_no_part_of_a_template_with_damaged_tables() {
    let fixture = Fixture::new();
    fixture.import("a", &random(1, 3 << 16));
    let alone = fixture.run(&["--json", "du"]).ok().json();
    let source = fixture.path("sparse");
    let file = File::create(&source).unwrap();
    file.set_len(256 << 20).unwrap();
    file.write_all_at(&random(1, 1 << 16), 0).unwrap();
    file.write_all_at(&random(2, 1 << 16), 1 << 20).unwrap();
    for name in ["b", "c", "d"] {
        // Three templates, so that at least one follows another in the order of digests.
        file.write_all_at(name.as_bytes(), 2 << 20).unwrap();
        fixture.run(&["import", source.to_str().unwrap(), name]).ok();
    }
    let folders: Vec<_> = ["b", "c", "d"]
        .map(|name| fixture.store().resolve(&name.parse().unwrap()).unwrap().to_string())
        .map(|digest| fixture.path("store/images").join(digest))
        .into();
    folders.iter().for_each(|folder| flip(&folder.join("image"), 70_000));
    let du = fixture.run(&["--json", "du"]).ok();
    assert_eq!(du.stderr.matches("is left out").count(), 3, "{du:?}");
    let du = du.json();
    assert_eq!(du["templates"], alone["templates"], "{du:#}");
    assert_eq!(du["totals"]["shared_bytes"], 0, "{du:#}");
}

#[test]
fn rm_removes_a_template_that_cannot_be_opened() {
    for (file, at) in
        [("image", Some(300)), ("placement", Some(300)), ("policy", Some(100)), ("policy", None)]
    {
        let fixture = Fixture::new();
        let kept = fixture.import("kept", &random(1, 3 << 16)).digest;
        let digest = fixture.import("web:1", &random(2, 3 << 16)).digest;
        let path = fixture.path("store/images").join(digest.to_string()).join(file);
        match at {
            Some(at) => flip(&path, at),
            None => fs::remove_file(&path).unwrap(),
        }
        let refused = fixture.run(&["gc"]);
        assert!(refused.code == 3 && refused.stderr.contains("stencil rm"), "{file}: {refused:?}");
        fixture.run(&["rm", "web:1"]).ok();
        fixture.run(&["verify"]).ok();
        fixture.run(&["gc"]).ok();
        assert_eq!(fixture.store().digests().unwrap(), [kept]);
        assert_eq!(fixture.files("packs").len(), 1);
    }
}

/// The inode numbers of such a template are unknown, so its users cannot be found: `rm` refuses as long as the store is
/// mounted.
#[test]
fn an_unopenable_template_is_not_removed_while_mounted() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        for file in ["image", "placement", "policy"] {
            let world = TestMount::new(serve);
            let digest = world.import_bytes(&random(2, 1 << 20), "web:1");
            let sound = world.import_bytes(&random(1, 1 << 20), "other");
            let folder = world.store_dir().join("images").join(&digest);
            let mut clone = Actor::start();
            clone.tell(&format!("map 0 {} 0 {} rw", world.file(&digest, "memory").display(), 1 << 20));
            clone.tell("read 0 3");
            flip(&folder.join(file), 100);
            let refused = || world.stencil(&["rm", "web:1"]).exits(75).says("may be in use");
            refused();
            let page = clone.ask("read 0 200").unwrap() as u8;
            assert_eq!(page, random(2, 1 << 20)[200 << 12], "{serve} {file}");
            clone.kill();
            refused();
            // Other templates can still be removed.
            assert_eq!(world.json(&["rm", "other"])["removed"][0]["digest"], sound);
            world.import_bytes(&random(1, 1 << 20), "other");
            // gc removes the other template.
            for tag in ["web/1", "other/latest"] {
                fs::remove_file(world.store_dir().join("tags").join(tag)).unwrap();
            }
            let collected = world.stencil(&["--json", "gc", "--untagged"]);
            assert!(
                collected.out.contains(&sound) && collected.err.contains("may be in use"),
                "{collected:?}"
            );
            assert!(folder.exists() && !folder.with_file_name(&sound).exists());
            world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
            world.stencil(&["rm", &digest]).ok();
            assert!(!folder.exists());
            world.stencil(&["verify"]).ok();
        }
    }
}

/// Each of these kinds of damage alone could stop a verification and hide everything after it.
#[test]
fn verify_reports_all_damage_and_continues() {
    let fixture = Fixture::new();
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)] {
        fixture.import(name, &random(seed, 3 << 16));
    }
    let store = fixture.store();
    let image = |name: &str| {
        let digest = store.resolve(&name.parse().unwrap()).unwrap();
        fixture.path("store/images").join(digest.to_string())
    };
    let (image, packs) = (["a", "b", "c", "d", "e"].map(image), fixture.files("packs"));
    let folder_for = |path: &Path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    };
    let mut expected = Vec::new();
    let mut damaged = |path: &Path| expected.push(path.to_owned());
    flip(&image[0].join("placement"), 8);
    damaged(&image[0].join("placement"));
    folder_for(&image[1].join("image"));
    damaged(&image[1].join("image"));
    folder_for(&image[2].join("policy"));
    damaged(&image[2].join("policy"));
    fs::remove_dir_all(&image[3]).unwrap();
    fs::write(&image[3], "a file").unwrap();
    damaged(&image[3]);
    flip(&packs[0], 8);
    damaged(&packs[0]);
    folder_for(&packs[1]);
    damaged(&packs[1]);
    flip(&packs[2], 5000);
    damaged(&packs[2]);
    let fifo = |path: &Path| {
        fs::remove_file(path).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    };
    fifo(&packs[3]);
    damaged(&packs[3]);
    fifo(&fixture.path("store/tags/d/latest"));
    damaged(&fixture.path("store/tags/d/latest"));
    folder_for(&fixture.path("store/tags/a/latest"));
    damaged(&fixture.path("store/tags/a/latest"));
    fs::remove_dir_all(fixture.path("store/tags/b")).unwrap();
    fs::write(fixture.path("store/tags/b"), "a file").unwrap();
    damaged(&fixture.path("store/tags/b"));
    fs::write(fixture.path("store/tags/c/latest"), "rubbish").unwrap();
    damaged(&fixture.path("store/tags/c/latest"));
    let verified = fixture.run(&["verify"]);
    assert_eq!(verified.code, 3, "{verified:?}");
    for path in &expected {
        assert!(verified.stdout.contains(path.to_str().unwrap()), "{}: {verified:?}", path.display());
    }
    let json = fixture.run(&["--json", "verify"]);
    assert_eq!(json.code, 3, "{json:?}");
    assert!(json.json()["templates"] == 5 && json.json()["packs"] == 5, "{json:?}");
    // Readable templates are listed as before.
    let listed = fixture.run(&["ls"]).ok();
    let rows = listed.stdout.lines().take_while(|line| !line.starts_with("damaged: template ")).count();
    assert!(listed.stdout.contains("\ne ") && rows == 6, "{listed:?}");
    fixture.run(&["du"]).ok();
}

#[test]
fn verify_continues_without_a_directory_of_the_store() {
    for folder in ["packs", "tags", "images"] {
        let fixture = Fixture::new();
        fixture.import("a", &random(1, 3 << 16));
        fixture.import("b", &random(2, 3 << 16));
        let path = fixture.path("store").join(folder);
        fs::rename(&path, fixture.path("away")).unwrap();
        let verified = fixture.run(&["verify"]);
        assert_eq!(verified.code, 3, "{folder}: {verified:?}");
        assert!(verified.stdout.contains(&format!("damaged: {}", path.display())), "{folder}: {verified:?}");
        fs::rename(fixture.path("away"), &path).unwrap();
        fixture.run(&["verify"]).ok();
    }
}

/// A tag with a flipped bit names another template or none: the template that it named must not be removed as untagged.
#[test]
fn a_damaged_tag_protects_its_template() {
    let fixture = Fixture::new();
    let digest = fixture.import("web:1", &random(1, 3 << 16)).digest;
    fixture.run(&["tag", "web:1", "web:2"]).ok();
    let tag = fixture.path("store/tags/web/2");
    let sound = fs::read(&tag).unwrap();
    let another = |byte: u8| if byte == b'0' { b'1' } else { b'0' };
    for damaged in [[&sound[..10], &[another(sound[10])], &sound[11..]].concat(), b"rubbish".to_vec()] {
        fs::write(&tag, &damaged).unwrap();
        for words in [&["rm", "web:1"][..], &["gc", "--untagged"]] {
            let refused = fixture.run(words);
            assert!(refused.code == 3 && refused.stderr.contains("web:2"), "{refused:?}");
            assert_eq!(fixture.store().digests().unwrap(), [digest]);
        }
    }
    fixture.run(&["rm", "web:2"]).ok();
    fixture.run(&["rm", "web:1"]).ok();
    assert_eq!(fixture.store().digests().unwrap(), []);
}
