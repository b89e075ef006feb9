//! Fuzz targets of the store's formats. `crate::fuzz` lists and replays them.

use super::format::Preamble;
use super::format::image::{self, ImageHeader};
use super::format::pack::{IndexEntry, PackHeader};
use super::format::placement::{Front, Row};
use super::format::stream::{StreamFront, decode_entry};
use super::read::tree::SEGMENT;

const HASH: usize = 32;

/// Returns two inputs: the bytes unchanged, and the bytes with a valid checksum in their last 32 bytes. Without the
/// second input, each change of a field would fail at the checksum and never reach the decoder.
fn sealed(data: &[u8]) -> [Vec<u8>; 2] {
    let mut valid = data.to_vec();
    if let Some((body, hash)) = valid.split_last_chunk_mut::<HASH>() {
        *hash = *blake3::hash(body).as_bytes();
    }
    [data.to_vec(), valid]
}

/// Asserts that `encoded` is the only encoding of a header, except for feature words that a reader ignores.
fn assert_only_encoding(bytes: &[u8], encoded: &[u8], sum: usize) {
    let fields = |bytes: &[u8]| bytes[Preamble::LEN..encoded.len() - sum].to_vec();
    assert_eq!(fields(bytes), fields(encoded), "two encodings of one header");
}

/// The header of an image.
pub fn image(data: &[u8]) {
    let Ok(header) = ImageHeader::decode(data) else { return };
    let encoded = header.encode();
    assert_eq!(ImageHeader::decode(&encoded), Ok(header.clone()));
    assert_only_encoding(data, &encoded, 0);
    assert!(header.image_length() <= image::MAX_LENGTH && header.block_count() <= image::MAX_BLOCKS);
}

/// The front of a placement, and its rows.
pub fn placement(data: &[u8]) {
    for bytes in sealed(data) {
        let Ok(front) = Front::decode(&bytes) else { continue };
        let encoded = front.encode();
        assert_eq!(Front::decode(&encoded), Ok(front.clone()));
        assert_only_encoding(&bytes, &encoded, HASH);
        let parts = front.sections(|length| length.div_ceil(SEGMENT).max(1));
        assert!(
            parts.rows <= parts.image_tree
                && parts.image_tree < parts.rows_tree
                && parts.rows_tree < parts.end
        );
    }
    for bytes in data.chunks_exact(Row::LEN) {
        let Ok(row) = Row::decode(bytes) else { continue };
        let mut encoded = Vec::new();
        Row::encode(row, &mut encoded);
        assert_eq!(encoded, bytes, "two encodings of one row");
    }
}

/// The header of a pack, and the entries of its index.
pub fn pack(data: &[u8]) {
    for bytes in sealed(data.get(..PackHeader::LEN).unwrap_or(data)) {
        let Ok(header) = PackHeader::decode(&bytes) else { continue };
        assert_eq!(PackHeader::decode(&header.encode()), Ok(header.clone()));
        assert!(header.file_length() >= header.index_offset);
    }
    for bytes in data.chunks_exact(IndexEntry::LEN) {
        let Ok(entry) = IndexEntry::decode(bytes) else { continue };
        let mut encoded = Vec::new();
        entry.encode(&mut encoded);
        assert_eq!(encoded, bytes, "two encodings of one entry");
        assert_eq!(decode_entry(bytes).is_ok(), entry.stored.offset == 0);
    }
}

/// Returns a stream as it is, and with valid checksums of its front and of the whole: the content is decoded only after
/// the front.
pub fn streams(data: &[u8]) -> [Vec<u8>; 2] {
    let mut valid = data.to_vec();
    if let Ok(length) = StreamFront::peek(data)
        && let Some(front) = valid.get_mut(..length as usize)
        && let Some((body, hash)) = front.split_last_chunk_mut::<HASH>()
    {
        *hash = *blake3::hash(body).as_bytes();
        if let Some((body, hash)) = valid.split_last_chunk_mut::<HASH>() {
            *hash = *blake3::hash(body).as_bytes();
        }
    }
    [data.to_vec(), valid]
}

/// Returns valid inputs of the binary formats, and inputs with one defect each: (target, name, bytes).
#[cfg(test)]
pub fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    use super::format::placement::FileStats;
    use super::format::{BlockKind, PackId, Stored};
    use super::{Digest, FileKind};

    let image = |files: &[(&str, FileKind, u64)]| {
        let files = files.iter().map(|(name, kind, size)| ((*name).to_owned(), *kind, *size));
        ImageHeader::new(files).unwrap().encode()
    };
    let (memory, rom, state) =
        (("memory", FileKind::Ram, 3 << 16), ("rom", FileKind::Rom, 4096), ("state", FileKind::Blob, 0));
    let stored = |offset, kind| Stored { offset, length: 65536, kind, data_pages: 0xffff };
    let hash = Digest::of(b"a block");

    let front = |packs: u8| Front {
        digest: Digest::of(b"an image"),
        image_length: 1000,
        block_count: 3,
        rows_root: Digest::of(b"rows"),
        files: vec![FileStats { data_bytes: 8192, stored_bytes: 77 }; 2],
        packs: (0..packs).map(|id| PackId([id; 16])).collect(),
    };
    let mut placement = front(2).encode();
    let raw = Row { pack: 1, stored: stored(256, BlockKind::Raw) };
    for row in [None, Some(raw), Some(Row { pack: 0, stored: stored(9000, BlockKind::Raw) })] {
        Row::encode(row, &mut placement);
    }
    let mut index = Vec::new();
    for offset in [0, 256, 70_000] {
        IndexEntry { hash, stored: stored(offset, BlockKind::Raw) }.encode(&mut index);
    }
    let header = PackHeader::new(PackId([7; 16]), 66_000, 3, Digest::of(&index)).encode();

    let mut all = vec![("pack", "index".to_owned(), index)];
    // Two templates with tags, labels and a recipe; a scenario loads the same stream.
    let stream = std::fs::read("tests/data/stream-1.stencil").unwrap();
    for part in 1..16 {
        let mut bytes = stream.clone();
        let at = bytes.len() * part / 16;
        bytes[at] ^= 0x10;
        all.push(("stream", format!("changed-at-{at}"), bytes));
    }
    for (target, name, bytes) in [
        ("stream", "two-templates", stream),
        ("image", "one-file", image(&[memory])),
        ("image", "three-files", image(&[memory, rom, state])),
        ("image", "largest", image(&[("a", FileKind::Blob, image::MAX_BYTES)])),
        ("placement", "front", front(0).encode()),
        ("placement", "front-and-rows", placement),
        ("pack", "header", header),
        (
            "pack",
            "empty",
            PackHeader::new(PackId([0; 16]), PackHeader::LEN as u64, 0, Digest::of(b"")).encode(),
        ),
    ] {
        let with = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            bytes
        };
        for (defect, bytes) in [
            ("valid", bytes.clone()),
            ("magic", with(0, b'X')),
            ("version", with(8, 2)),
            ("header-length", with(14, 1)),
            ("ignored-feature", with(16, 1)),
            ("unknown-feature", with(32, 1)),
            ("first-field", with(Preamble::LEN, 0xff)),
            ("last-byte", with(bytes.len() - 1, 0xff)),
            ("truncated", bytes[..bytes.len() / 2].to_vec()),
            ("longer", [&bytes[..], &[0; 48]].concat()),
        ] {
            all.push((target, format!("{name}-{defect}"), bytes));
        }
    }
    all
}
