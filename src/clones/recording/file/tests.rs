use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::clones::recording::sample::CloneSample;
use crate::error::Code;
use crate::store::Digest;
use crate::units::PageCount;

fn sample(second: u64, clones: u64) -> Sample {
    let clone = |pid: u64| CloneSample {
        id: format!("c{pid}"),
        pid: pid as u32,
        identity: pid,
        kind: "simulated".into(),
        digest: Digest::new([7; 32]),
        age_ms: Some(second * 1000),
        mapped_bytes: Bytes::new(1 << 20),
        mapped_clean_bytes: Bytes::new(4096),
        dirty_pages: PageCount::new(second),
        private_bytes: Bytes::new(4096 * second),
        swap_bytes: Bytes::ZERO,
        page_table_bytes: Bytes::new(8192),
        overhead_bytes: Bytes::new(12288),
        disk_bytes: Bytes::ZERO,
    };
    let time = serde_json::from_str(&format!("\"{}\"", crate::sanitize::utc(second))).unwrap();
    Sample { time, took_ms: 3, clones: (0..clones).map(clone).collect(), ..Sample::default() }
}

fn read(path: &Path) -> Result<Vec<Sample>> {
    Recording::open(path)?.samples().collect()
}

fn append(path: &Path, sample: &Sample) -> Result<()> {
    Recorder::open(path, Bytes::new(64 << 20))?.append(sample)
}

#[test]
fn a_file_cut_at_any_byte_keeps_every_earlier_sample() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    let all = [sample(1, 1), sample(2, 0), sample(3, 1)];
    let mut ends = Vec::new();
    for one in &all {
        append(&path, one).unwrap();
        ends.push(fs::metadata(&path).unwrap().len());
    }
    assert_eq!(read(&path).unwrap(), all);
    let whole = fs::read(&path).unwrap();
    let header = header_line().unwrap().len();
    let more = sample(4, 1);
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let complete = ends.iter().filter(|end| **end <= cut as u64).count();
        match read(&path) {
            Ok(found) => assert_eq!(found, all[..complete], "cut at {cut}"),
            Err(error) => assert!(cut < header && error.code() == Code::Usage, "cut at {cut}: {error}"),
        }
        append(&path, &more).unwrap();
        let mut expected = all[..complete].to_vec();
        expected.push(more.clone());
        assert_eq!(read(&path).unwrap(), expected, "appended after a cut at {cut}");
    }
}

#[test]
fn what_a_crash_leaves_is_dropped() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    append(&path, &sample(1, 1)).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut zeros = serde_json::to_vec(&sample(2, 1)).unwrap();
    zeros[60..90].fill(0);
    for line in [&zeros[..], b"{\"time\":3}", b"{\"time\":\"2026-01-01T00:00:00Z\"}", b""] {
        fs::write(&path, [&whole, line, b"\n"].concat()).unwrap();
        fs::write(dir.path().join(".web.rec.thinned"), "half").unwrap();
        assert_eq!(read(&path).unwrap(), [sample(1, 1)]);
        append(&path, &sample(3, 0)).unwrap();
        assert_eq!(read(&path).unwrap(), [sample(1, 1), sample(3, 0)]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_full_recording_keeps_its_span_and_its_size() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    let max = Bytes::new(16 << 10);
    let mut recorder = Recorder::open(&path, max).unwrap();
    for second in 0..500 {
        recorder.append(&sample(second, second % 3)).unwrap();
        let size = fs::metadata(&path).unwrap().len();
        assert!(size <= max.get() && size == recorder.length().get(), "{size} bytes after {second} s");
    }
    let found = read(&path).unwrap();
    assert_eq!(found.len(), recorder.samples());
    assert_eq!(found.first(), Some(&sample(0, 0)));
    assert_eq!(found.last(), Some(&sample(499, 1)));
    assert!(found.is_sorted_by(|a, b| a.time < b.time));
    // Early and late samples are equally dense, but for the latest ones.
    let early = found.iter().filter(|s| s.time.since(Time::default()) < Duration::from_secs(250)).count();
    assert!(early * 4 > found.len(), "{early} of {} are of the first half", found.len());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
    drop(recorder);
    append(&path, &sample(500, 0)).unwrap();
    assert_eq!(read(&path).unwrap().len(), found.len() + 1);
}

#[test]
fn a_sample_that_cannot_fit_destroys_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    let mut recorder = Recorder::open(&path, Bytes::new(4096)).unwrap();
    (0..4).for_each(|second| recorder.append(&sample(second, 0)).unwrap());
    let before = fs::read(&path).unwrap();
    let error = recorder.append(&sample(5, 100)).unwrap_err();
    assert!(error.code() == Code::Usage && error.to_string().contains("maximum size"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
    recorder.append(&sample(6, 0)).unwrap();
    assert_eq!(read(&path).unwrap().len(), 5);
}

#[test]
fn one_recorder_at_a_time_and_only_recordings() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    let mut recorder = Recorder::open(&path, Bytes::new(8192)).unwrap();
    assert_eq!(append(&path, &sample(1, 0)).unwrap_err().code(), Code::InUse);
    // The lock survives thinning, which replaces the file.
    (0..50).for_each(|second| recorder.append(&sample(second, 1)).unwrap());
    assert_eq!(append(&path, &sample(1, 0)).unwrap_err().code(), Code::InUse);
    fs::rename(&path, dir.path().join("moved")).unwrap();
    let error = recorder.append(&sample(51, 0)).unwrap_err();
    assert!(error.to_string().contains("moved or removed"), "{error}");
    assert!(!path.exists());

    let other = dir.path().join("other");
    for text in ["root:x:0:0\n", "no line feed", "{\"format\":\"stencil-recordinG", "\n", "{}\n"] {
        fs::write(&other, text).unwrap();
        assert_eq!(append(&other, &sample(1, 0)).unwrap_err().code(), Code::Usage, "{text}");
        assert_eq!(read(&other).unwrap_err().code(), Code::Usage, "{text}");
        assert_eq!(fs::read_to_string(&other).unwrap(), text);
    }
    fs::write(&other, "{\"format\":\"stencil-recording\",\"version\":2}\n").unwrap();
    assert!(read(&other).unwrap_err().to_string().contains("version 2"));
    assert_eq!(read(&dir.path().join("none")).unwrap_err().code(), Code::NotFound);
    assert!(read(dir.path()).is_err());

    let damaged = dir.path().join("damaged");
    append(&damaged, &sample(1, 0)).unwrap();
    let mut text = fs::read_to_string(&damaged).unwrap();
    text.push_str("{\"time\":3}\n");
    text.push_str(&(serde_json::to_string(&sample(2, 0)).unwrap() + "\n"));
    fs::write(&damaged, &text).unwrap();
    let error = read(&damaged).unwrap_err();
    assert!(error.code() == Code::Damage && error.to_string().contains("line 3"), "{error}");
    assert_eq!(append(&damaged, &sample(2, 0)).unwrap_err().code(), Code::Damage);
}

#[test]
fn a_line_longer_than_a_chunk_is_found() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.rec");
    append(&path, &sample(1, 1000)).unwrap();
    let mut text = fs::read(&path).unwrap();
    assert!(text.len() as u64 > 3 * CHUNK);
    text.extend(vec![b'x'; 3 * CHUNK as usize]);
    fs::write(&path, &text).unwrap();
    assert_eq!(read(&path).unwrap(), [sample(1, 1000)]);
}

proptest! {
    #[test]
    fn bytes_of_others_are_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), after_header in any::<bool>()) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("web.rec");
        let mut text = if after_header { header_line().unwrap() } else { Vec::new() };
        text.extend(&bytes);
        fs::write(&path, &text).unwrap();
        let _ = read(&path);
        if append(&path, &sample(1, 0)).is_ok() {
            prop_assert_eq!(read(&path).unwrap(), [sample(1, 0)]);
        }
    }
}
