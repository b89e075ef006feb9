//! The header of a Firecracker state file, as far as all its releases agree on it.
//!
//! Every release writes a magic number (which names the processor), the version of its format, the state, and a CRC64
//! of all that. How version and state are encoded has changed twice:
//!
//! | snapshot version | bytes from the start |
//! |---|---|
//! | before 1 (Firecracker < 1.6) | magic with the version in its lowest 16 bits |
//! | 1 to 8 | magic, length of the version (8 bytes), version |
//! | 9 and later | one byte 0, magic, length of the version (1 byte), version |

use crc::{CRC_64_REDIS, Crc};

/// The upper half of the magic number.
const MAGIC: u64 = 0x0710_1984;

/// Processors by the third quarter of the magic number.
const MACHINES: [(u64, &str); 2] = [(0x8664, "x86_64"), (0xAAAA, "aarch64")];

/// The highest version whose header is known to be as above.
const NEWEST: u64 = 11;

/// Firecracker itself takes no state above 10 MB; more than this is none.
pub(super) const LONGEST_STATE: u64 = 64 << 20;

/// What the header of a state file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirecrackerState {
    /// Version of the snapshot format; not the release of Firecracker.
    pub version: String,
    /// The processor: `x86_64` or `aarch64`.
    pub machine: &'static str,
}

impl FirecrackerState {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// What the bytes are instead, as part of a sentence about the state file.
    pub fn header(bytes: &[u8]) -> Result<FirecrackerState, String> {
        let (magic, at) =
            [0, 1].into_iter().find_map(|at| magic(bytes, at)).ok_or("is not from Firecracker")?;
        let machine = MACHINES.iter().find(|(number, _)| *number == (magic >> 16) & 0xFFFF);
        let (_, machine) =
            machine.ok_or_else(|| format!("is of an unknown processor (magic {magic:#018x})"))?;
        let version = match (magic & 0xFFFF, at) {
            (0, 0) => {
                let length: [u8; 8] = field(bytes, 8).ok_or("is cut short")?;
                version(bytes, 16, u64::from_le_bytes(length))?
            }
            (0, _) => version(bytes, 10, u64::from(*bytes.get(9).ok_or("is cut short")?))?,
            (old, _) => format!("0.{old}"),
        };
        Ok(FirecrackerState { version, machine })
    }

    /// Reads a whole state file: the header, and the checksum at its end.
    ///
    /// # Errors
    /// As [`FirecrackerState::header`].
    pub fn whole(bytes: &[u8]) -> Result<FirecrackerState, String> {
        let state = Self::header(bytes)?;
        let Some((all, sum)) = bytes.split_last_chunk::<8>() else { return Err("is cut short".into()) };
        let (got, expected) = (Crc::<u64>::new(&CRC_64_REDIS).checksum(all), u64::from_le_bytes(*sum));
        if got != expected {
            return Err(format!(
                "is damaged or not whole: its checksum is {got:#018x}, its end says {expected:#018x}"
            ));
        }
        Ok(state)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn magic(bytes: &[u8], at: usize) -> Option<(u64, usize)> {
    if bytes.get(..at)?.iter().any(|&b| b != 0) {
        return None;
    }
    let magic = u64::from_le_bytes(field(bytes, at)?);
    (magic >> 32 == MAGIC).then_some((magic, at))
}

/// `MAJOR.MINOR.PATCH`, of at most so many bytes that no bound is needed elsewhere.
fn version(bytes: &[u8], at: usize, length: u64) -> Result<String, String> {
    let text = usize::try_from(length).ok().filter(|l| *l <= 32).and_then(|l| bytes.get(at..at + l));
    let text = text.and_then(|t| std::str::from_utf8(t).ok()).ok_or("has no version that can be read")?;
    let numbers: Option<Vec<u64>> = text.split('.').map(|n| n.parse().ok()).collect();
    match numbers.as_deref() {
        Some([major, _, _]) if *major > NEWEST => {
            Err(format!("has snapshot version {text}; this build knows versions up to {NEWEST}"))
        }
        Some([_, _, _]) => Ok(text.to_owned()),
        _ => Err("has no version that can be read".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn every_encoding_of_the_header_is_read() {
        let (intel, arm) = (number(0x8664_0000), number(0xAAAA_0000));
        for (header, version, machine) in [
            (sealed(&[&number(0x8664_0017)]), "0.23", "x86_64"),
            (sealed(&[&intel, &5u64.to_le_bytes(), b"4.0.0"]), "4.0.0", "x86_64"),
            (sealed(&[&arm, &5u64.to_le_bytes(), b"8.0.0"]), "8.0.0", "aarch64"),
            (sealed(&[&[0], &intel, &[6], b"10.0.0"]), "10.0.0", "x86_64"),
            (sealed(&[&[0], &arm, &[6], b"11.2.3"]), "11.2.3", "aarch64"),
        ] {
            let state = FirecrackerState { version: version.into(), machine };
            assert_eq!(FirecrackerState::whole(&header), Ok(state));
        }
    }

    #[test]
    fn what_is_none_is_named() {
        let intel = number(0x8664_0000);
        let good = sealed(&[&[0], &intel, &[6], b"10.0.0"]);
        let mut flipped = good.clone();
        flipped[20] ^= 1;
        for (bytes, words) in [
            (vec![], "not from Firecracker"),
            (b"QEVM\0\0\0\x03".to_vec(), "not from Firecracker"),
            (number(0x1234_0000).to_vec(), "unknown processor"),
            (intel.to_vec(), "cut short"),
            (sealed(&[&intel, &u64::MAX.to_le_bytes(), b"4.0.0"]), "no version"),
            (sealed(&[&intel, &3u64.to_le_bytes(), b"4.x"]), "no version"),
            (sealed(&[&[0], &intel, &[6], b"12.0.0"]), "snapshot version 12.0.0"),
            (flipped, "damaged or not whole"),
            (good[..good.len() - 1].to_vec(), "damaged or not whole"),
        ] {
            let why = FirecrackerState::whole(&bytes).unwrap_err();
            assert!(why.contains(words), "{words}: {why}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
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
