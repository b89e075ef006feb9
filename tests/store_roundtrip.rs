//! What goes in comes out, byte for byte, under one identity.

use std::fs;
use std::path::Path;

use stencilfs::progress::Silent;
use stencilfs::store::{
    BLOCK_SIZE, Digest, FileKind, ImportFile, ImportRequest, Imported, Scratch, Source, Store,
};

/// Bytes that do not compress, the same for the same seed.
pub fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn request(dir: &Path, tag: &str, bytes: &[u8]) -> ImportRequest {
    let source = dir.join(format!("{}.source", Digest::of(tag.as_bytes()).short()));
    fs::write(&source, bytes).unwrap();
    let file = ImportFile { name: "memory".into(), kind: FileKind::Blob, source: Source::Path(source) };
    ImportRequest::new(Some(tag.parse().unwrap()), vec![file])
}

fn import(store: &Store, dir: &Path, tag: &str, bytes: &[u8]) -> Imported {
    store.import(request(dir, tag, bytes), &Silent).unwrap()
}

fn read_all(store: &Store, digest: &Digest) -> Vec<u8> {
    let template = store.template(digest).unwrap();
    let (mut scratch, mut out, mut block) = (Scratch::default(), Vec::new(), vec![1; BLOCK_SIZE as usize]);
    for number in 0..template.block_count(0) {
        let length = template.read_block(0, number, &mut scratch, &mut block).unwrap();
        out.extend_from_slice(&block[..length]);
    }
    out
}

/// Every shape that the cutting into blocks could get wrong.
fn shapes() -> Vec<(&'static str, Vec<u8>)> {
    let holes = [vec![0; 3 << 20], random(4, 200_000), vec![0; (3 << 20) + 17]].concat();
    let mut sparse_pages = vec![0; 40 * 4096];
    sparse_pages[4096 * 21 + 7] = 1;
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
        ("text", b"compress me ".repeat(300_000)),
    ]
}

#[test]
fn every_shape_with_every_codec_round_trips_under_one_digest() {
    let dir = tempfile::tempdir().unwrap();
    for (shape, bytes) in shapes() {
        let mut digests = Vec::new();
        for (codec, chunk) in [
            ("lz4", "64k"),
            ("zstd:9", "64k"),
            ("none", "64k"),
            ("lz4", "4k"),
            ("zstd", "16k"),
            ("none", "8k"),
        ] {
            let store = Store::open_or_create(&dir.path().join(format!("{shape}-{codec}-{chunk}"))).unwrap();
            let mut request = request(dir.path(), "a", &bytes);
            request.compression = codec.parse().unwrap();
            request.chunk_size = chunk.parse().unwrap();
            let imported = store.import(request, &Silent).unwrap();
            assert!(read_all(&store, &imported.digest) == bytes, "{shape} {codec} {chunk}");
            digests.push(imported.digest);
        }
        assert!(digests.iter().all(|d| *d == digests[0]), "{shape}: {digests:?}");
    }
    assert!(
        import(&Store::open_or_create(&dir.path().join("s")).unwrap(), dir.path(), "x", b"1")
            .stored_bytes
            .get()
            > 0
    );
}
