//! Exported bytes equal the imported bytes, under one digest.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;

use stencilfs::progress::Silent;
use stencilfs::store::{Digest, Scratch, Serving, Store, inode_number};
use stencilfs::units::FileOffset;

use crate::support::store::{Fixture, guest_like, random, read_all, stencil};

/// Contents that could break the division into blocks.
fn shapes() -> Vec<(&'static str, Vec<u8>)> {
    let holes = [vec![0; 3 << 20], random(4, 200_000), vec![0; (3 << 20) + 17]].concat();
    let mut sparse_pages = vec![0; 40 * 4096];
    sparse_pages[4096 * 21 + 7] = 1;
    let mut last_byte = vec![0; (2 << 20) + 1];
    last_byte[2 << 20] = 9;
    vec![
        ("empty", Vec::new()),
        ("one byte", vec![7]),
        ("one page", random(1, 4096)),
        ("one block", random(2, 65536)),
        ("a block and a byte", random(2, 65537)),
        ("all zero", vec![0; 5 << 20]),
        ("all random", random(3, (5 << 20) + 4096)),
        ("holes at both ends", holes),
        ("single pages", sparse_pages),
        ("last byte", last_byte),
        ("text", b"compress me ".repeat(300_000)),
        // Longer than all buffers of the pipeline together, so that buffers are reused.
        ("long", [random(8, 14 << 20), random(9, 100)].concat()),
        ("guest", guest_like(7, 7 << 20)),
    ]
}

const CODECS: [&str; 4] = ["lz4", "zstd", "zstd:9", "none"];

#[test]
fn every_content_with_every_codec_has_one_digest_and_its_bytes() {
    for (shape, bytes) in shapes() {
        let mut digests = Vec::new();
        for codec in CODECS {
            let fixture = Fixture::new();
            let mut request = fixture.request("a", &bytes);
            request.compression = codec.parse().unwrap();
            let imported = fixture.store().import(request, &Silent).unwrap();
            let back = read_all(&fixture.store(), &imported.digest, 0).unwrap();
            assert!(back == bytes, "{shape} {codec}");
            digests.push(imported.digest);
        }
        assert!(digests.iter().all(|d| *d == digests[0]), "{shape}: {digests:?}");
    }
}

/// Ranges at unaligned offsets, across blocks and to the last byte.
#[test]
fn range_reads_equal_the_whole_content() {
    let bytes = [guest_like(8, 1 << 20), random(5, 100_001)].concat();
    for codec in CODECS {
        let fixture = Fixture::new();
        let mut request = fixture.request("a", &bytes);
        request.compression = codec.parse().unwrap();
        let digest = fixture.store().import(request, &Silent).unwrap().digest;
        let template = fixture.store().template(&digest).unwrap();
        let mut scratch = Scratch::default();
        let choices = random(6, 4000);
        for choice in choices.chunks(8) {
            let number = |part: &[u8]| u32::from_le_bytes(part.try_into().unwrap()) as usize;
            let start = number(&choice[..4]) % bytes.len();
            let longest = if choice[4] % 2 == 0 { 5000 } else { 200_000 };
            let length = (number(&choice[4..]) % longest).min(bytes.len() - start);
            let mut out = vec![0xaa; length];
            template.read_range(0, FileOffset::new(start as u64), &mut scratch, &mut out).unwrap();
            assert!(out == bytes[start..start + length], "{codec}: {length} bytes at {start}");
        }
        let end = FileOffset::new(bytes.len() as u64 - 1);
        assert!(template.read_range(0, end, &mut scratch, &mut [0; 2]).is_err());
    }
}

/// The store's data count equals that of a page-by-page model, and the ranges cover exactly these pages.
#[test]
fn data_is_counted_in_pages() {
    for (shape, bytes) in shapes() {
        let fixture = Fixture::new();
        let digest = fixture.import("a", &bytes).digest;
        let template = fixture.store().template(&digest).unwrap();
        let pages = bytes.chunks(4096).filter(|p| p.iter().any(|b| *b != 0)).count() as u64;
        assert_eq!(template.files()[0].data_bytes.get(), pages * 4096, "{shape}");
        let ranges = template.data_ranges(0).unwrap();
        for (number, block) in bytes.chunks(65536).enumerate() {
            let mask = block
                .chunks(4096)
                .enumerate()
                .fold(0u16, |mask, (page, bytes)| mask | u16::from(bytes.iter().any(|b| *b != 0)) << page);
            let number = number as u64;
            assert_eq!(template.data_pages(0, number).unwrap(), mask, "{shape}");
            assert_eq!(ranges.iter().any(|r| r.contains(&number)), mask != 0, "{shape} block {number}");
            // A block's ID is the hash of its bytes, padded with zeros.
            let mut padded = block.to_vec();
            padded.resize(65536, 0);
            let hash = (mask != 0).then(|| Digest::of(&padded));
            assert_eq!(template.block_id(0, number).unwrap(), hash, "{shape} block {number}");
        }
        assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "{shape}: {ranges:?}");
    }
}

/// With the commands instead of the library: import from a file and a pipe, export to a file and a pipe. Holes stay
/// holes on request.
#[test]
fn export_returns_the_imported_file() {
    for (shape, mut bytes) in shapes() {
        bytes.resize(bytes.len().next_multiple_of(4096).max(4096), 0);
        let fixture = Fixture::new();
        let source = fixture.path("source");
        // The file has real holes in place of its zero pages.
        let file = File::create(&source).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (page, part) in bytes.chunks(4096).enumerate() {
            if part.iter().any(|b| *b != 0) {
                file.write_all_at(part, page as u64 * 4096).unwrap();
            }
        }
        let out = fixture.path("out");
        let (source_text, out_text) = (source.to_str().unwrap(), out.to_str().unwrap());
        fixture.run(&["import", source_text, "a"]).ok();
        let blocks = |path| fs::metadata(path).unwrap().blocks();
        fixture.run(&["export", "a", out_text]).ok();
        assert!(fs::read(&out).unwrap() == bytes, "{shape}");
        assert!(blocks(&out) * 512 >= bytes.len() as u64, "{shape}: {} blocks", blocks(&out));
        fixture.run(&["export", "a", out_text, "--force", "--sparse"]).ok();
        assert!(fs::read(&out).unwrap() == bytes, "{shape}");
        assert!(
            blocks(&out) <= blocks(&source) + 16,
            "{shape}: {} blocks, {}",
            blocks(&out),
            blocks(&source)
        );

        let piped = stencil(fixture.dir.path(), &["import", "-", "b", "--json"])
            .stdin(Stdio::from(
                stencil(fixture.dir.path(), &["export", "a/memory", "-"])
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap()
                    .stdout
                    .unwrap(),
            ))
            .output()
            .unwrap();
        let piped: serde_json::Value = serde_json::from_slice(&piped.stdout).unwrap();
        assert_eq!(piped["existed"], true, "{shape}: the import from a pipe has another digest");
        fixture.assert_clean();
    }
}

/// The digest does not depend on names, labels, mode, owner, codec and host; it does depend on each byte,
/// kind and name of a file.
#[test]
fn the_digest_depends_only_on_content() {
    let bytes = guest_like(1, 4 << 20);
    let (one, two) = (Fixture::new(), Fixture::new());
    let source = one.file("m", &bytes);
    let source = source.to_str().unwrap();
    let state = one.file("s", b"device state");
    let state = state.to_str().unwrap();
    let digest = |fixture: &Fixture, args: &[&str]| {
        let mut all = vec!["import", source];
        all.extend(args);
        all.push("--json");
        fixture.run(&all).ok().json()["digest"].as_str().unwrap().to_owned()
    };
    let base = digest(&one, &["a:1", "--state", state]);
    assert_eq!(
        base,
        digest(&one, &["b:2", "--state", state, "--label", "k=v", "--mode", "0400", "--owner", "7:8"])
    );
    assert_eq!(base, digest(&two, &["a", "--state", state, "--compression", "zstd:7"]));
    assert_eq!(base, digest(&two, &["c", "--state", state, "--compression", "none"]));
    assert_eq!(base, digest(&two, &["d", "--file", &format!("state={state},kind=blob")]));
    for other in [
        digest(&two, &["e"]),
        digest(&two, &["f", "--file", &format!("other={state},kind=blob")]),
        digest(&two, &["g", "--state", source]),
        digest(&two, &["h", "--file", &format!("state={source},kind=rom")]),
        digest(&two, &["i", "--file", &format!("state={source},kind=ram")]),
    ] {
        assert_ne!(base, other);
    }
    // One template with two tags; the later policy applies.
    let inspected = one.run(&["inspect", "a:1", "--json"]).ok().json();
    assert_eq!(inspected["tags"], serde_json::json!(["a:1", "b:2"]));
    assert_eq!((&inspected["mode"], &inspected["uid"]), (&"0400".into(), &7.into()));
    assert_eq!(inspected["labels"]["k"], "v");
    // The digest is the plain BLAKE3 hash of the image on the disk.
    let image = fs::read(one.path("store/images").join(&base).join("image")).unwrap();
    assert_eq!(blake3::hash(&image).to_hex().as_str(), base);
    // Inode numbers depend on the store, not on the tag.
    let (a, b) = (Store::open(&one.path("store")).unwrap(), Store::open(&two.path("store")).unwrap());
    let digest = base.parse().unwrap();
    let inode = |store: &Store| inode_number(&store.secret(), &digest, "memory", Serving::Decode);
    assert_ne!(inode(&a), inode(&b));
}

#[test]
fn export_writes_several_files_into_a_directory() {
    let fixture = Fixture::new();
    let parts =
        [("memory", guest_like(1, 1 << 20)), ("node1", guest_like(2, 1 << 20)), ("state", random(3, 777))];
    let paths: Vec<String> =
        parts.iter().map(|(n, b)| fixture.file(n, b).to_str().unwrap().to_owned()).collect();
    let node = format!("node1={}", paths[1]);
    fixture.run(&["import", &paths[0], "numa", "--state", &paths[2], "--file", &node]).ok();
    let out = fixture.path("out");
    fs::create_dir(&out).unwrap();
    fixture.run(&["export", "numa", out.to_str().unwrap()]).ok();
    for (name, bytes) in &parts {
        assert!(fs::read(out.join(name)).unwrap() == *bytes, "{name}");
    }
    let single = fixture.path("single");
    fixture.run(&["export", "numa/node1", single.to_str().unwrap()]).ok();
    assert!(fs::read(single).unwrap() == parts[1].1);
    assert_eq!(fixture.run(&["export", "numa/nope", "/dev/null"]).code, 4);
    fixture.run(&["verify"]).ok();
}
