//! Import of Firecracker snapshots: full snapshots become templates; other files are rejected with the reason.

mod balloon;
mod capture;
mod damage;
mod page_faults;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::support::store::{Fixture, Ran, guest_like, stencil};

const MIB: usize = 1 << 20;

/// CRC-64 with Jones's polynomial, as in Firecracker, computed bit by bit: independent of the implementation under
/// test.
fn crc64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| (crc >> 1) ^ (0x95ac_9329_ac4b_c9b5 * (crc & 1)))
    })
}

/// A state file in the layout of the releases that wrote this snapshot version (`0.N` for the versions before 1);
/// `machine` is 0x8664 (x86_64) or 0xAAAA (aarch64).
pub fn state(machine: u64, version: &str, seed: u64) -> Vec<u8> {
    let magic = 0x0710_1984_0000_0000u64 | machine << 16;
    let (major, rest) = version.split_once('.').unwrap();
    let mut bytes = match major.parse().unwrap() {
        0 => (magic | rest.parse::<u64>().unwrap()).to_le_bytes().to_vec(),
        1..=8 => {
            let length = version.len() as u64;
            [&magic.to_le_bytes()[..], &length.to_le_bytes(), version.as_bytes()].concat()
        }
        _ => [&[0], &magic.to_le_bytes()[..], &[version.len() as u8], version.as_bytes()].concat(),
    };
    bytes.extend(guest_like(seed, 5000));
    bytes.extend(crc64(&bytes).to_le_bytes());
    bytes
}

fn import(fixture: &Fixture, memory: &str, state: &str) -> Ran {
    let path = |name: &str| fixture.path(name).display().to_string();
    let args = ["import", &path(memory), "fc", "--state", &path(state), "--format", "firecracker"];
    fixture.run(&args)
}

#[test]
fn imports_full_snapshots_of_every_version() {
    assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca, "the check value of this CRC");
    let fixture = Fixture::new();
    let memory = guest_like(5, 4 * MIB);
    fixture.file("memory", &memory);
    let known =
        ["0.1".to_owned(), "0.23".to_owned()].into_iter().chain((1..=12).map(|major| format!("{major}.0.0")));
    for (name, is_known) in known.map(|version| (version, true)).chain([("13.0.0".to_owned(), false)]) {
        let bytes = state(0x8664, &name, 7);
        fixture.file(&name, &bytes);
        let path = fixture.path(&name).display().to_string();
        let memory_path = fixture.path("memory").display().to_string();
        let args = ["import", &memory_path, "fc", "--state", &path, "--format", "firecracker", "--json"];
        let ran = fixture.run(&args).ok();
        let warnings: Vec<String> = serde_json::from_value(ran.json()["warnings"].clone()).unwrap();
        assert_eq!(warnings.is_empty(), is_known, "{name}: {ran:?}");
        for warning in &warnings {
            assert!(warning.contains("snapshot version 13.0.0, but the newest known one is 12"), "{warning}");
            assert!(ran.stderr.contains(&format!("note: {warning}")), "{ran:?}");
        }
        for (file, expected) in [("memory", &memory), ("state", &bytes)] {
            let out = fixture.path(&format!("{name}.{file}"));
            fixture.run(&["export", &format!("fc/{file}"), out.to_str().unwrap()]).ok();
            assert!(fs::read(out).unwrap() == *expected, "{name} {file}");
        }
    }
    fixture.assert_clean();
}

#[test]
fn rejects_incomplete_foreign_and_diff_snapshots() {
    let fixture = Fixture::new();
    let memory = guest_like(5, 4 * MIB);
    fixture.file("memory", &memory);
    fixture.file("good", &state(0x8664, "10.0.0", 7));
    fixture.file("arm", &state(0xAAAA, "10.0.0", 7));
    let mut newer = state(0x8664, "99.0.0", 7);
    newer[1000] ^= 1;
    fixture.file("newer", &newer);
    let mut foreign = state(0x8664, "10.0.0", 7);
    foreign[8] ^= 1;
    fixture.file("foreign", &foreign);
    let mut damaged = state(0x8664, "10.0.0", 7);
    damaged[2000] ^= 4;
    fixture.file("damaged", &damaged);
    fixture.file("cut", &damaged[..900]);
    fixture.file("qemu", b"QEVM\0\0\0\x03 and so on");
    fixture.file("empty", b"");
    let huge = File::create(fixture.path("huge")).unwrap();
    huge.set_len(1 << 40).unwrap();
    for (state, message) in [
        ("arm", "aarch64, but this host is x86_64"),
        ("newer", "damaged or incomplete"),
        ("foreign", "was not written by Firecracker"),
        ("damaged", "damaged or incomplete"),
        ("cut", "damaged or incomplete"),
        ("qemu", "was not written by Firecracker"),
        ("empty", "was not written by Firecracker"),
        ("huge", "file 'state' is too large"),
    ] {
        let ran = import(&fixture, "memory", state);
        assert_eq!(ran.code, 2, "{state}: {ran:?}");
        assert!(ran.stderr.contains(message), "{state}: {ran:?}");
    }

    // A diff snapshot has holes for unchanged pages. One such page in each 64 KiB must be enough for
    // import to reject the file.
    let diff = File::create(fixture.path("diff")).unwrap();
    diff.set_len(memory.len() as u64).unwrap();
    for page in (0..memory.len()).step_by(4096).filter(|at| at % (64 << 10) != 8192) {
        diff.write_all_at(&memory[page..page + 4096], page as u64).unwrap();
    }
    let ran = import(&fixture, "diff", "good");
    assert_eq!(ran.code, 2, "{ran:?}");
    let holes = memory.len() / 16;
    assert!(
        ran.stderr.contains(&format!("{holes} of {} bytes of the memory file are holes", memory.len())),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("diff snapshot") && ran.stderr.contains("--base T"), "{ran:?}");

    fixture.file("short", &memory[..MIB + 4096]);
    let ran = import(&fixture, "short", "good");
    assert!(ran.code == 2 && ran.stderr.contains("multiple of 1 MiB"), "{ran:?}");
    let good = fixture.path("good").display().to_string();
    let args = ["import", "-", "fc", "--state", &good, "--format", "firecracker"];
    let piped: Ran = stencil(fixture.dir.path(), &args)
        .stdin(File::open(fixture.path("memory")).unwrap())
        .output()
        .unwrap()
        .into();
    assert!(
        piped.code == 2 && piped.stderr.contains("cannot check a pipe for a Firecracker snapshot"),
        "{piped:?}"
    );

    assert_eq!(fixture.run(&["inspect", "fc"]).code, 4, "none of the rejected files may become a template");
    import(&fixture, "memory", "good").ok();
    fixture.assert_clean();
}
