//! A reader written from the tables of `docs/reference/store-format.md` alone reads a template.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use stencilfs::progress::Silent;
use stencilfs::store::{FileKind, ImportFile, Source};

use crate::support::store::{Fixture, guest_like};

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn assert_preamble(bytes: &[u8], magic: &str, header: usize) {
    assert_eq!(&bytes[..8], magic.as_bytes());
    assert_eq!((u32_at(bytes, 8), u32_at(bytes, 12)), (1, header));
    assert_eq!(bytes[16..40], [0; 24]);
}

fn assert_sum(bytes: &[u8], end: usize) {
    assert_eq!(*blake3::hash(&bytes[..end]).as_bytes(), bytes[end..end + 32]);
}

/// Decodes the block of a record.
fn decode(kind: u8, shift: u8, record: &[u8]) -> Vec<u8> {
    assert_eq!(shift, 16);
    match kind {
        1 => record.to_vec(),
        2 => lz4_flex::block::decompress(record, 65536).unwrap(),
        3 => zstd::bulk::decompress(record, 65536).unwrap(),
        other => panic!("kind {other}"),
    }
}

fn packs(store: &Path) -> HashMap<Vec<u8>, Vec<u8>> {
    let mut packs = HashMap::new();
    for entry in fs::read_dir(store.join("packs")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert_preamble(&bytes, "STNCLPAK", 256);
        assert_sum(&bytes, 224);
        let id = bytes[40..56].to_vec();
        assert_eq!(path.file_name().unwrap().to_str().unwrap(), format!("{}.pack", hex(&id)));
        assert_eq!(bytes[56..72], [0; 16]);
        let (index, count) = (u64_at(&bytes, 72), u64_at(&bytes, 80));
        let end = index + count * 48;
        assert_eq!(bytes.len(), end.next_multiple_of(4096));
        assert!(bytes[end..].iter().all(|byte| *byte == 0));
        assert_eq!(*blake3::hash(&bytes[index..end]).as_bytes(), bytes[88..120]);
        let entries: Vec<&[u8]> = bytes[index..end].chunks(48).collect();
        assert!(entries.windows(2).all(|pair| pair[0][..32] < pair[1][..32]));
        for entry in entries {
            let (offset, length) = (u32_at(entry, 32), u32_at(entry, 36));
            let block = decode(entry[40], entry[41], &bytes[offset..offset + length]);
            assert_eq!(*blake3::hash(&block).as_bytes(), entry[..32]);
        }
        packs.insert(id, bytes);
    }
    packs
}

#[test]
fn a_reader_written_from_the_documentation_reads_a_template() {
    let fixture = Fixture::new();
    let (ram, blob) = (guest_like(1, 3 << 20), b"state of devices".repeat(5000));
    for codec in ["lz4", "zstd", "none"] {
        // Each codec has its own RAM blocks and shares the blocks of the state with the others.
        let ram: Vec<u8> =
            ram.iter().map(|b| if *b == 0 { 0 } else { b ^ codec.as_bytes()[0] | 1 }).collect();
        let mut request = fixture.request(codec, &ram);
        let source = Source::Path(fixture.file("blob", &blob));
        request.files.push(ImportFile { name: "state".into(), kind: FileKind::Blob, source });
        request.compression = codec.parse().unwrap();
        let digest = fixture.store().import(request, &Silent).unwrap().digest.to_string();
        let store = fixture.path("store");

        let head = fs::read(store.join("format")).unwrap();
        assert_preamble(&head, "STNCLSTR", 160);
        assert_eq!(head.len(), 160);
        assert_sum(&head, 128);
        assert_eq!(head[56..88], fixture.store().secret());
        assert_eq!(
            fs::read_to_string(store.join("tags").join(codec).join("latest")).unwrap(),
            format!("blake3:{digest}\n")
        );

        let folder = store.join("images").join(&digest);
        let image = fs::read(folder.join("image")).unwrap();
        assert_eq!(blake3::hash(&image).to_string(), digest);
        assert_preamble(&image, "STNCLIMG", 96 + 2 * 160);
        assert_eq!((u32_at(&image, 40), u32_at(&image, 44), u32_at(&image, 64)), (16, 1, 2));
        let blocks = u64_at(&image, 72);

        let placement = fs::read(folder.join("placement")).unwrap();
        let front = u32_at(&placement, 12);
        assert_preamble(&placement, "STNCLPLC", front);
        assert_sum(&placement, front - 32);
        assert_eq!(hex(&placement[40..72]), digest);
        assert_eq!((u64_at(&placement, 72), u64_at(&placement, 80)), (image.len(), blocks));
        let (files, pack_count) = (u32_at(&placement, 88), u32_at(&placement, 92));
        assert_eq!(front, 160 + 32 * files + 16 * pack_count + 32);
        let rows = &placement[front..front + 16 * blocks];
        assert_eq!(*blake3::hash(rows).as_bytes(), placement[96..128]);
        let segments = |length: usize| length.div_ceil(65536).max(1);
        let end = front + rows.len() + 32 * (segments(image.len()) + segments(rows.len()));
        assert_eq!(placement.len(), end);

        let packs = packs(&store);
        let mut number = 0;
        for (file, (name, kind, expected)) in
            [("memory", 0, &ram), ("state", 2, &blob)].into_iter().enumerate()
        {
            let entry = &image[96 + file * 160..][..160];
            assert_eq!(
                (u32_at(entry, 0), u32_at(entry, 4), u64_at(entry, 8)),
                (kind, name.len(), expected.len())
            );
            assert_eq!(&entry[32..32 + name.len()], name.as_bytes());
            for block in expected.chunks(65536) {
                let mut padded = block.to_vec();
                padded.resize(65536, 0);
                let hash = &image[96 + 2 * 160 + number * 32..][..32];
                let row = &rows[number * 16..][..16];
                number += 1;
                if padded.iter().all(|b| *b == 0) {
                    assert_eq!((hash, row), (&[0; 32][..], &[0; 16][..]));
                    continue;
                }
                assert_eq!(hash, blake3::hash(&padded).as_bytes());
                let mask = padded.chunks(4096).enumerate().fold(0u16, |mask, (page, bytes)| {
                    mask | u16::from(bytes.iter().any(|b| *b != 0)) << page
                });
                assert_eq!(u16::from_le_bytes([row[14], row[15]]), mask);
                let id = &placement[160 + 32 * files + 16 * u32_at(row, 0)..][..16];
                let (offset, length) = (u32_at(row, 4), u32_at(row, 8));
                assert!(decode(row[12], row[13], &packs[id][offset..offset + length]) == padded);
            }
        }
        assert_eq!(number, blocks);
        let policy = fs::read_to_string(folder.join("policy")).unwrap();
        let (line, body) = policy.split_once('\n').unwrap();
        assert_eq!(line, format!("stencil policy 1 blake3:{}", blake3::hash(body.as_bytes())));
    }
}
