use std::fs;

use serde_json::json;

use super::*;
use crate::clones::recording::{Recorder, Sample};
use crate::units::Bytes;

/// A sample with each kind of row.
fn sample() -> Value {
    let digest = "7".repeat(64);
    let totals = [
        "mapped_bytes",
        "copied_bytes",
        "template_bytes",
        "store_cache_bytes",
        "private_bytes",
        "page_table_bytes",
        "overhead_bytes",
        "disk_bytes",
        "swap_bytes",
        "host_bytes",
        "bytes_per_further_clone",
    ];
    let clone = [
        "mapped_bytes",
        "mapped_clean_bytes",
        "dirty_pages",
        "private_bytes",
        "swap_bytes",
        "page_table_bytes",
        "overhead_bytes",
        "disk_bytes",
        "age_ms",
    ];
    let numbered = |fields: &[&str], mut object: Value| {
        fields.iter().for_each(|field| object[*field] = 4096.into());
        object
    };
    json!({
        "time": "2026-01-01T00:00:00.000Z",
        "took_ms": 4,
        "boot_id": "b",
        "stores": ["s"],
        "host": {"MemTotal": 1 << 30, "MemAvailable": 1 << 29, "MemFree": 1 << 28, "AnonPages": 4096},
        "totals": numbered(&totals, json!({"clones": 1})),
        "templates": [{
            "digest": digest,
            "tags": ["web:1"],
            "serving": "decode",
            "size_bytes": 8192,
            "data_bytes": 4096,
            "resident_bytes": 4096,
            "clones": 1,
            "working_set": {"recordings": 1, "pages": 1},
            "places": [{
                "file": "memory",
                "file_pages": 2,
                "bucket_pages": 1,
                "dirty_pages": [1, 0],
                "working_set_pages": [0, 1],
            }],
        }],
        "clones": [numbered(&clone, json!({"id": "c", "pid": 1, "identity": 1, "kind": "other", "digest": digest}))],
        "reasons": [{"code": "overhead", "clones": 1, "bytes": 4096, "remedy": "none"}],
    })
}

fn page_of(samples: &[&Value]) -> Result<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.rec");
    drop(Recorder::open(&path, Bytes::new(1 << 20)).unwrap());
    let mut text = fs::read_to_string(&path).unwrap();
    samples.iter().for_each(|sample| text += &format!("{sample}\n"));
    fs::write(&path, text).unwrap();
    let figures = Figures::of(&Recording::open(&path)?)?;
    page::comparison(&Comparison::new(figures.clone(), figures))
}

/// Returns the paths of all numbers.
fn numbers(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(path.to_owned()),
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(n, value)| numbers(value, &format!("{path}/{n}"), found));
        }
        Value::Object(all) => {
            all.iter().for_each(|(name, value)| numbers(value, &format!("{path}/{name}"), found));
        }
        _ => {}
    }
}

#[test]
fn no_number_of_a_recording_is_a_panic() {
    let sample = sample();
    serde_json::from_value::<Sample>(sample.clone()).unwrap();
    assert!(page_of(&[&sample, &sample]).unwrap().contains("</html>"));
    let mut paths = Vec::new();
    numbers(&sample, "", &mut paths);
    assert!(paths.len() > 40, "{paths:?}");
    let mut refused = 0;
    for path in paths {
        for number in [0, 1 << 40, 1 << 53, (1 << 53) + 1, u64::MAX] {
            let mut changed = sample.clone();
            *changed.pointer_mut(&path).unwrap() = number.into();
            refused += u32::from(page_of(&[&sample, &changed]).is_err());
            let _ = page_of(&[&changed]);
        }
    }
    assert!(refused > 50, "{refused}");
    // Times in every order, and so that the clock was set back.
    let times =
        ["-009999-01-03T00:00:00Z", "1970-01-01T00:00:00Z", "2026-01-01T00:00:01Z", "9999-12-30T00:00:00Z"];
    for (middle, last) in times.iter().flat_map(|middle| times.map(|last| (middle, last))) {
        let at = |time: &str| {
            let mut changed = sample.clone();
            changed["time"] = time.into();
            changed
        };
        let page = page_of(&[&sample, &at(middle), &at(last)]).unwrap();
        assert!(page.contains("</html>"), "{middle}, {last}");
    }
    // All numbers at their bound, so that sums are largest.
    let mut paths = Vec::new();
    numbers(&sample, "", &mut paths);
    let mut changed = sample.clone();
    for path in paths.iter().filter(|path| !path.ends_with("pid")) {
        let limit = if path.ends_with("pages") { 1 << 40 } else { 1_u64 << 53 };
        *changed.pointer_mut(path).unwrap() = limit.into();
    }
    changed["templates"][0]["working_set"]["recordings"] = 1.into();
    assert!(page_of(&[&sample, &changed]).is_ok());
}
