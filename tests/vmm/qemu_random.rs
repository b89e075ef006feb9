//! Objects with random options, given to QEMU and to Stencil: both must give the same verdict and the same error text.

use crate::support::host;
use crate::support::vm::object_files::{Files, explain};
use crate::support::vm::qemu_object::{Verdict, verdict};

/// A linear congruential generator with a fixed seed, so that a failure can be reproduced.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn one<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

const SWITCH: &[&str] = &["on", "off", "on", "off", "yes", "n", "true", "x", ""];
const SIZES: &[&str] = &[
    "4M",
    "1M",
    "0",
    "4k",
    "4096",
    "8M",
    "0.5M",
    "10000",
    "1.5",
    "x",
    "",
    "0x1000",
    "-1",
    "+4k",
    "4K",
    "1e3",
    "4B",
    "512",
    "18446744073709551615",
    "16E",
    "7E",
];

/// Keys of both object types, with valid and invalid values.
const COMMON_KEYS: &[(&str, &[&str])] = &[
    ("size", SIZES),
    ("share", SWITCH),
    ("reserve", SWITCH),
    ("prealloc", &["on", "off"]),
    ("prealloc-threads", &["1", "0", "4", "x", "0x10", "010", "09", "4294967296"]),
    ("merge", &["on", "off", "no"]),
    ("dump", SWITCH),
    ("host-nodes", &["0", "0-1", "1-0", "127", "128", "x", "65536", "3-"]),
    ("policy", &["default", "bind", "preferred", "interleave", "x"]),
    ("id", &["n", "1", "a.b-c_"]),
    ("x-use-canonical-path-for-ramblock-id", &["on", "off"]),
];

/// Keys of memory-backend-file only. No file is empty: an empty file is opened for writing, and if the open is
/// read-only, Stencil differs from QEMU.
const FILE_KEYS: &[(&str, &[&str])] = &[
    (
        "mem-path",
        &["{file}", "{file}", "{file}", "{short}", "{missing}", "{folder}", "", "/dev/zero", "{file}/x"],
    ),
    ("readonly", SWITCH),
    ("rom", &["on", "off", "auto", "x"]),
    ("align", &["0", "2M", "4k", "12k", "5000", "1G", "8k"]),
    ("offset", &["0", "4k", "512", "1M", "8M", "x", "18446744073709547520"]),
    ("discard-data", &["on", "off"]),
    ("pmem", &["on", "off"]),
];

fn object(dice: &mut Dice) -> String {
    let file = dice.chance(80);
    let mut pairs = Vec::new();
    for (key, value, percent) in [("id", "m", 95), ("size", dice.one(&["4M", "1M"]), 95)] {
        if dice.chance(percent) {
            pairs.push((key, value));
        }
    }
    if file && dice.chance(95) {
        pairs.push(("mem-path", dice.one(FILE_KEYS[0].1)));
    }
    for _ in 0..dice.below(6) {
        let keys = if file && dice.chance(50) { FILE_KEYS } else { COMMON_KEYS };
        let (key, values) = keys[dice.below(keys.len())];
        pairs.push((key, dice.one(values)));
    }
    // At most one unknown key: which of several QEMU reports depends on the order of its hash table.
    if dice.chance(4) {
        pairs.push(if file { ("foo", "1") } else { ("readonly", "on") });
    }
    for n in (1..pairs.len()).rev() {
        pairs.swap(n, dice.below(n + 1));
    }
    let name = if file { "memory-backend-file" } else { "memory-backend-ram" };
    if dice.chance(20) { json(dice, name, pairs) } else { key_values(dice, name, &pairs) }
}

fn key_values(dice: &mut Dice, name: &str, pairs: &[(&str, &str)]) -> String {
    let mut text = name.to_owned();
    for (key, value) in pairs {
        text += &match dice.below(40) {
            // `mem-path` without a value would be a file named "on" in the working directory.
            0 if *key != "mem-path" => format!(",{key}"),
            1 if !["foo", "mem-path"].contains(key) => format!(",no{key}"),
            _ => format!(",{key}={value}"),
        };
    }
    text
}

fn json(dice: &mut Dice, name: &str, mut pairs: Vec<(&str, &str)>) -> String {
    pairs.sort_unstable();
    pairs.dedup_by_key(|(key, _)| *key);
    let mut fields = vec![format!(r#""qom-type":"{name}""#)];
    for (key, value) in pairs {
        let value = match (key, dice.chance(85)) {
            ("size" | "align" | "offset", true) => {
                // No negative sizes: QEMU aborts on a negative size of memory without a file.
                dice.one(&["4194304", "1048576", "0", "4096", "8192", "1", "2097152", "1.5"]).to_owned()
            }
            ("prealloc-threads", true) => dice.one(&["1", "0", "4294967296", "-3"]).to_owned(),
            ("host-nodes", true) => {
                dice.one(&["[0]", "[0,1]", "[]", "[128]", "[70000]", "[true]"]).to_owned()
            }
            ("mem-path" | "id" | "rom" | "policy", _) | (_, false) => format!("\"{value}\""),
            _ => dice.one(&["true", "false", "true", "false", "null"]).to_owned(),
        };
        fields.push(format!(r#""{key}":{value}"#));
    }
    format!("{{{}}}", fields.join(","))
}

/// The documented difference: QEMU dies by SIGSEGV when it preallocates ROM.
fn is_documented_difference(theirs: &Verdict) -> bool {
    *theirs == Verdict::Died(libc::SIGSEGV)
}

fn assert_same_verdicts(count: usize, seed: u64) {
    let _host = host::shared();
    let mut dice = Dice(seed);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..count {
        let object = object(&mut dice);
        let (for_qemu, for_us) = (Files::new(&object), Files::new(&object));
        let theirs = verdict(&for_qemu.expand(&object), None).without_hint();
        let (ours, _) = explain(&for_us.expand(&object), &for_us, None);
        let ours = match ours.without_hint() {
            Verdict::Refused { words, .. } => {
                let (ours, theirs) = (for_us.folder.path(), for_qemu.folder.path());
                Verdict::refused(&words.replace(ours.to_str().unwrap(), theirs.to_str().unwrap()))
            }
            other => other,
        };
        match theirs {
            _ if is_documented_difference(&theirs) => {
                assert!(matches!(ours, Verdict::Refused { .. }), "{object}")
            }
            _ => assert_eq!(ours, theirs, "round {round} of seed {seed}: {object}"),
        }
        match ours {
            Verdict::Accepted => accepted += 1,
            _ => refused += 1,
        }
    }
    assert!(accepted * 10 > count && refused * 10 > count, "{accepted} accepted, {refused} refused");
}

#[test]
fn random_objects_get_the_verdict_of_qemu() {
    assert_same_verdicts(100, 1);
}

/// Many more objects under `make soak`.
#[test]
fn soak_random_objects_get_the_verdict_of_qemu() {
    assert_same_verdicts(host::rounds(50, 600), 2);
}
