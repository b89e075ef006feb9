//! Malicious streams, in which all checksums may be right.

use std::fs::{self, File};

use stencilfs::error::Code;
use stencilfs::progress::Silent;
use stencilfs::store::{Incoming, LoadRequest, TemplateRef};

use crate::support::host;
use crate::support::store::{Fixture, guest_like, random};
use crate::support::stream::{assert_nothing, assert_same, import, load, save};

/// A deterministic sequence of random numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % below as u64) as usize
    }
}

/// Recomputes the hashes of front and stream.
pub fn seal(stream: &mut [u8]) {
    let end = stream.len() - 32;
    let front = u32::from_le_bytes(stream[12..16].try_into().unwrap()) as usize;
    if (64..end).contains(&front) {
        let hash = blake3::hash(&stream[..front - 32]);
        stream[front - 32..front].copy_from_slice(hash.as_bytes());
    }
    let hash = blake3::hash(&stream[..end]);
    stream[end..].copy_from_slice(hash.as_bytes());
}

fn mutate(stream: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    // Most of a stream is records; positions near the start are more interesting.
    let place = |dice: &mut Dice, length: usize| match dice.roll(3) {
        0 => dice.roll(length),
        1 => dice.roll(length.min(400)),
        _ => dice.roll(length.min(2400)),
    };
    for _ in 0..=dice.roll(3) {
        let (at, length) = (place(dice, bytes.len()), bytes.len());
        match dice.roll(7) {
            0 => bytes[at] ^= 1 << dice.roll(8),
            1 => bytes[at] = [0, 1, 0x7f, 0xff][dice.roll(4)],
            2 => bytes.truncate(at.max(1)),
            3 => drop(bytes.drain(at..(at + 1 + dice.roll(70)).min(length))),
            4 => {
                let part = bytes[at..(at + 1 + dice.roll(200)).min(length)].to_vec();
                let to = place(dice, length);
                bytes.splice(to..to, part);
            }
            5 => {
                let number = [0u32, 1, 0xffff, 1 << 31, u32::MAX][dice.roll(5)].to_le_bytes();
                let at = at / 4 * 4;
                let end = (at + 4).min(length);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            _ => {
                let to = place(dice, length);
                bytes.swap(at, to);
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    if bytes.len() > 100 && dice.roll(5) > 0 {
        seal(&mut bytes);
    }
    bytes
}

#[test]
fn soak_mutated_streams_give_the_right_template_or_nothing() {
    let from = Fixture::new();
    let bytes = [&random(1, 3 << 12)[..], &[0; 1 << 16], &guest_like(3, 70 << 10)[..68 << 10]].concat();
    from.import("web:1", &bytes);
    import(&from, "more", 4, "zstd");
    let streams = [save(&from, &["web:1"]), save(&from, &["more", "web:1"])];
    let to = Fixture::new();
    let store = to.store();
    let path = to.path("incoming");
    let seed = host::rounds(1, u64::from(std::process::id()));
    // The seed is shown if the test fails.
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let (mut accepted, mut refused) = (0, 0);
    let rounds = host::rounds(2000, 10_000);
    for round in 0..rounds {
        // Mostly the small stream: the interesting fields are in its headers.
        let stream = &streams[usize::from(round % 16 == 0)];
        let mutated = mutate(stream, &mut dice);
        fs::write(&path, &mutated).unwrap();
        let loaded = Incoming::open(File::open(&path).unwrap(), &path, None, None)
            .and_then(|stream| store.load(stream, &LoadRequest::default(), &Silent));
        match loaded {
            Err(e) => {
                assert!(
                    [Code::Damage, Code::Usage, Code::NotFound].contains(&e.code())
                        || e.message().contains("newer"),
                    "round {round}: {e}"
                );
                refused += 1;
            }
            Ok(loaded) => {
                accepted += 1;
                for template in loaded.templates {
                    let digest = template.digest.to_string();
                    // Equal digests mean equal content: an accepted template is one that was saved, under any name.
                    assert!(
                        from.store().has(&template.digest),
                        "round {round}: digest {digest} does not exist in the source"
                    );
                    assert_same(&from, &to, &digest);
                    let policy = store.template(&template.digest).unwrap().policy().clone();
                    assert_eq!(policy.mode & !0o444, 0);
                    let digest = template.digest;
                    store
                        .remove(
                            &TemplateRef::Digest(digest),
                            Some(&digest),
                            |_| Ok(Some(Vec::new())),
                            |_| Ok(Vec::new()),
                        )
                        .unwrap();
                }
            }
        }
    }
    assert_eq!(store.digests().unwrap(), []);
    assert_eq!(store.tags().unwrap(), []);
    to.assert_clean();
    to.run(&["verify"]).ok();
    assert!(refused > rounds / 2 && accepted > 0, "{refused} refused, {accepted} accepted");
}

/// All hashes are right, but the last block of a file has nonzero bytes beyond the end of the file: the same content
/// under a second digest.
#[test]
fn load_refuses_nonzero_bytes_beyond_the_end_of_a_file() {
    let from = Fixture::new();
    from.import("web:1", &random(1, 3 << 12));
    let stream = save(&from, &["web:1"]);
    let front = u32::from_le_bytes(stream[12..16].try_into().unwrap()) as usize;
    let image = front + u32::from_le_bytes(stream[104..108].try_into().unwrap()) as usize;
    let with_tail = |tail: u8| {
        let mut block = [&random(1, 3 << 12)[..], &[0; (64 << 10) - (3 << 12)]].concat();
        block[40_000] = tail;
        let hash = *blake3::hash(&block).as_bytes();
        let mut stream = stream.clone();
        stream[image + 96 + 160..][..32].copy_from_slice(&hash);
        let digest = *blake3::hash(&stream[image..][..96 + 160 + 32]).as_bytes();
        stream[64..96].copy_from_slice(&digest);
        stream.truncate(image + 96 + 160 + 32);
        stream.extend_from_slice(&hash);
        stream.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 1, 16]);
        let pages = 0b111u16 | if tail == 0 { 0 } else { 1 << (40_000 / 4096) };
        stream.extend_from_slice(&pages.to_le_bytes());
        stream.extend_from_slice(&[0; 4]);
        stream.extend_from_slice(&block);
        stream.extend_from_slice(&[0; 32]);
        seal(&mut stream);
        stream
    };
    let to = Fixture::new();
    let ran = load(&to, &with_tail(1));
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.stdout.contains("has nonzero bytes beyond its end"), "{ran:?}");
    assert_nothing(&to);
    load(&to, &with_tail(0)).ok();
}

/// Invalid fields with right checksums, which only a manipulated stream can have.
#[test]
fn load_reports_invalid_fields_with_right_checksums() {
    let from = Fixture::new();
    from.import("web:1", &random(1, 3 << 12));
    let stream = save(&from, &["web:1"]);
    let to = Fixture::new();
    let front = u32::from_le_bytes(stream[12..16].try_into().unwrap()) as usize;
    let policy = u32::from_le_bytes(stream[104..108].try_into().unwrap()) as usize;
    let at = |offset: usize, bytes: &[u8]| {
        let mut stream = stream.clone();
        stream[offset..offset + bytes.len()].copy_from_slice(bytes);
        seal(&mut stream);
        stream
    };
    // The policy with a changed value of the same length and a right hash.
    let body_at = front + "stencil policy 1 blake3:".len() + 64 + 1;
    let body = String::from_utf8(stream[body_at..front + policy].to_vec()).unwrap();
    assert!(body.contains("\"mode\": 292"), "{body}");
    let body = body.replace("\"mode\": 292", "\"mode\": 493");
    let hash = blake3::hash(body.as_bytes()).to_hex();
    let writable = at(front + 24, &[hash.as_bytes(), b"\n", body.as_bytes()].concat());
    let image = front + policy;
    let record = image + 96 + 160 + 32;
    let cases: [(Vec<u8>, &str); 10] = [
        (at(40, &[0; 4]), "number of templates (0)"),
        (at(40, &[0xff; 4]), "number of templates (4294967295)"),
        (at(48, &[0xff; 8]), "expected at most 1"),
        (at(48, &[0; 8]), "is damaged: content has hash"),
        (at(96, &[0xff; 8]), "truncated at offset"),
        (at(96, &[0x21]), "is 289, expected 288 bytes"),
        (at(104, &[0xff; 4]), "is too large: 4294967295 bytes"),
        (writable, "invalid permissions: mode 755"),
        (at(image + 96 + 8, &[0xff]), "has hash"),
        (at(record + 40, &[1]), "cannot be verified: "),
    ];
    for (number, (bytes, words)) in cases.into_iter().enumerate() {
        let ran = load(&to, &bytes);
        assert_eq!(ran.code, 3, "case {number}: {ran:?}");
        assert!(ran.stdout.contains(words), "case {number}: '{words}' is not in {ran:?}");
        assert_nothing(&to);
    }
    load(&to, &stream).ok();
}
