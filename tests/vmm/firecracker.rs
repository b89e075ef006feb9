//! Import of Firecracker snapshots: full snapshots become templates; other files are rejected with the reason.

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

/// A state file in the layout of Firecracker's snapshot version 9 and later; `machine` is 0x8664 (x86_64) or 0xAAAA
/// (aarch64).
pub fn state(machine: u64, version: &str, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend((0x0710_1984_0000_0000u64 | machine << 16).to_le_bytes());
    bytes.push(version.len() as u8);
    bytes.extend(version.as_bytes());
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
fn imports_full_snapshots_of_both_state_formats() {
    assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca, "the check value of this CRC");
    let fixture = Fixture::new();
    let memory = guest_like(5, 4 * MIB);
    fixture.file("memory", &memory);
    let mut older = [&0x0710_1984_8664_0000u64.to_le_bytes()[..], &5u64.to_le_bytes(), b"4.0.0"].concat();
    older.extend(guest_like(8, 3000));
    older.extend(crc64(&older).to_le_bytes());
    for (name, bytes) in [("new", state(0x8664, "10.0.0", 7)), ("older", older)] {
        fixture.file(name, &bytes);
        import(&fixture, "memory", name).ok();
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
    fixture.file("newer", &state(0x8664, "99.0.0", 7));
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
        ("newer", "unsupported snapshot version 99.0.0"),
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
    assert!(ran.stderr.contains("diff snapshot") && ran.stderr.contains("snapshot-editor"), "{ran:?}");

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
