//! Header and checksum of a Firecracker state file.
//!
//! Every release writes a magic number (which names the processor architecture), the version of the snapshot format,
//! the state, and a CRC64 of all bytes before the CRC. The encoding of version and state has changed twice:
//!
//! | snapshot version | bytes from the start |
//! |---|---|
//! | before 1 (Firecracker < 1.6) | magic with the version in its lowest 16 bits |
//! | 1 to 8 | magic, length of the version (8 bytes), version |
//! | 9 and later | one byte 0, magic, length of the version (1 byte), version |

use crc::{CRC_64_REDIS, Crc};

/// Upper 32 bits of the magic number.
const MAGIC: u64 = 0x0710_1984;

/// Architectures by bits 16 to 31 of the magic number.
const MACHINES: [(u64, &str); 2] = [(0x8664, "x86_64"), (0xAAAA, "aarch64")];

/// Highest major snapshot version that a release has written.
const NEWEST: u64 = 12;

/// Longest file that is read as a state file, in bytes; Firecracker itself rejects a state above 10 MB.
pub(in crate::store) const MAX_STATE_BYTES: u64 = 64 << 20;

/// Header of a Firecracker state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirecrackerState {
    /// Version of the snapshot format (not the Firecracker release).
    pub version: String,
    /// Processor architecture: `x86_64` or `aarch64`.
    pub machine: &'static str,
}

impl FirecrackerState {
    /// Decodes the header at the start of `bytes`.
    ///
    /// # Errors
    /// Returns a clause about the state file (`is truncated`), to be put after a noun.
    pub fn header(bytes: &[u8]) -> Result<FirecrackerState, String> {
        let (magic, at) = magic_at_either_place(bytes).ok_or("was not written by Firecracker")?;
        let found = MACHINES.iter().find(|(number, _)| *number == (magic >> 16) & 0xFFFF);
        let (_, machine) =
            found.ok_or_else(|| format!("is for an unknown processor architecture (magic {magic:#018x})"))?;
        let version = match (magic & 0xFFFF, at) {
            (0, 0) => {
                let length: [u8; 8] = field(bytes, 8).ok_or("is truncated")?;
                version(bytes, 16, u64::from_le_bytes(length))?
            }
            (0, _) => version(bytes, 10, u64::from(*bytes.get(9).ok_or("is truncated")?))?,
            (old, _) => format!("0.{old}"),
        };
        Ok(FirecrackerState { version, machine })
    }

    /// Returns true if `bytes` begin with Firecracker's magic number, whatever follows it.
    pub fn has_magic(bytes: &[u8]) -> bool {
        magic_at_either_place(bytes).is_some()
    }

    /// Describes a version that is newer than every known one, as a clause about the state file; `None` for all other
    /// versions.
    ///
    /// The state is not decoded and only Firecracker loads it. A newer version therefore needs no support, as long as
    /// header and checksum are those of this module.
    pub fn newer_than_known(&self) -> Option<String> {
        let major: u64 = self.version.split('.').next()?.parse().ok()?;
        (major > NEWEST).then(|| {
            format!(
                "has snapshot version {}, but the newest known one is {NEWEST}; the state is stored as it is",
                self.version
            )
        })
    }

    /// Decodes the header of a complete state file and verifies the checksum at its end.
    ///
    /// # Errors
    /// Same as [`FirecrackerState::header`].
    pub fn whole(bytes: &[u8]) -> Result<FirecrackerState, String> {
        let state = Self::header(bytes)?;
        let Some((all, sum)) = bytes.split_last_chunk::<8>() else { return Err("is truncated".into()) };
        let (got, expected) = (Crc::<u64>::new(&CRC_64_REDIS).checksum(all), u64::from_le_bytes(*sum));
        if got != expected {
            return Err(format!(
                "is damaged or incomplete: it has checksum {got:#018x}, expected {expected:#018x}"
            ));
        }
        Ok(state)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn magic_at_either_place(bytes: &[u8]) -> Option<(u64, usize)> {
    [0, 1].into_iter().find_map(|at| magic(bytes, at))
}

fn magic(bytes: &[u8], at: usize) -> Option<(u64, usize)> {
    if bytes.get(..at)?.iter().any(|&b| b != 0) {
        return None;
    }
    let magic = u64::from_le_bytes(field(bytes, at)?);
    (magic >> 32 == MAGIC).then_some((magic, at))
}

/// Decodes a version `MAJOR.MINOR.PATCH` of at most 32 bytes.
fn version(bytes: &[u8], at: usize, length: u64) -> Result<String, String> {
    let text = usize::try_from(length).ok().filter(|l| *l <= 32).and_then(|l| bytes.get(at..at + l));
    let text = text.and_then(|t| std::str::from_utf8(t).ok()).ok_or("has no readable version")?;
    let numbers: Option<Vec<u64>> = text.split('.').map(|n| n.parse().ok()).collect();
    match numbers.as_deref() {
        Some([_, _, _]) => Ok(text.to_owned()),
        _ => Err("has no readable version".into()),
    }
}

#[cfg(test)]
mod tests {
    use crate::store::format::firecracker::*;

    fn sealed(header: &[&[u8]]) -> Vec<u8> {
        let mut bytes = header.concat();
        bytes.extend(b"the state itself");
        let sum = Crc::<u64>::new(&CRC_64_REDIS).checksum(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    fn number(low: u64) -> [u8; 8] {
        (MAGIC << 32 | low).to_le_bytes()
    }

    #[test]
    fn decodes_every_header_encoding() {
        let (intel, arm) = (number(0x8664_0000), number(0xAAAA_0000));
        for (header, version, machine) in [
            (sealed(&[&number(0x8664_0017)]), "0.23", "x86_64"),
            (sealed(&[&intel, &5u64.to_le_bytes(), b"4.0.0"]), "4.0.0", "x86_64"),
            (sealed(&[&arm, &5u64.to_le_bytes(), b"8.0.0"]), "8.0.0", "aarch64"),
            (sealed(&[&[0], &intel, &[6], b"10.0.0"]), "10.0.0", "x86_64"),
            (sealed(&[&[0], &arm, &[6], b"12.2.3"]), "12.2.3", "aarch64"),
        ] {
            let state = FirecrackerState { version: version.into(), machine };
            assert_eq!(state.newer_than_known(), None);
            assert_eq!(FirecrackerState::whole(&header), Ok(state));
        }
    }

    #[test]
    fn accepts_a_newer_version_and_describes_it() {
        let state = FirecrackerState::whole(&sealed(&[&[0], &number(0x8664_0000), &[6], b"13.0.0"])).unwrap();
        let why = state.newer_than_known().unwrap();
        assert!(why.contains("version 13.0.0") && why.contains("known one is 12"), "{why}");
    }

    #[test]
    fn rejects_other_files_with_the_reason() {
        let intel = number(0x8664_0000);
        let good = sealed(&[&[0], &intel, &[6], b"10.0.0"]);
        let mut flipped = good.clone();
        flipped[20] ^= 1;
        for (bytes, words) in [
            (vec![], "not written by Firecracker"),
            (b"QEVM\0\0\0\x03".to_vec(), "not written by Firecracker"),
            (number(0x1234_0000).to_vec(), "unknown processor architecture"),
            (intel.to_vec(), "is truncated"),
            (sealed(&[&intel, &u64::MAX.to_le_bytes(), b"4.0.0"]), "no readable version"),
            (sealed(&[&intel, &3u64.to_le_bytes(), b"4.x"]), "no readable version"),
            (flipped, "damaged or incomplete"),
            (good[..good.len() - 1].to_vec(), "damaged or incomplete"),
        ] {
            let why = FirecrackerState::whole(&bytes).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn never_panics_on_changed_bytes() {
        let good = sealed(&[&[0], &number(0x8664_0000), &[6], b"10.0.0"]);
        for at in 0..good.len() {
            for value in [0, 1, 5, 0x7F, 0x80, 0xFF] {
                let mut bytes = good.clone();
                bytes[at] = value;
                assert!(FirecrackerState::whole(&bytes).is_err() || bytes == good, "{at} {value}");
                let _ = FirecrackerState::whole(&bytes[..at]);
            }
        }
    }
}
