//! The ledger: the memory file with the mount state that a supervisor leaves to its successor. It has two halves,
//! written in turn, so that a supervisor that is killed during a write leaves the other half intact.

use crate::units::to_usize;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Length of a half, in bytes.
pub const HALF_BYTES: u64 = 16 << 20;
/// Length of the header of a half, in bytes: sequence number, length and BLAKE3 hash of the text.
pub const HEAD_BYTES: usize = 8 + 8 + 32;

/// Returns the newest intact text and its sequence number; `None` if the file is not a ledger or no half is intact.
pub fn newest(file: &File) -> Option<(u64, Vec<u8>)> {
    [0, 1].into_iter().filter_map(|half| read_half(file, half)).max_by_key(|(sequence, _)| *sequence)
}

fn read_half(file: &File, half: u64) -> Option<(u64, Vec<u8>)> {
    let mut head = [0; HEAD_BYTES];
    file.read_exact_at(&mut head, half * HALF_BYTES).ok()?;
    let sequence = u64::from_le_bytes(head[..8].try_into().ok()?);
    let length = u64::from_le_bytes(head[8..16].try_into().ok()?);
    if sequence % 2 != half || length > HALF_BYTES - HEAD_BYTES as u64 {
        return None;
    }
    let mut text = vec![0; to_usize(length)];
    file.read_exact_at(&mut text, half * HALF_BYTES + HEAD_BYTES as u64).ok()?;
    (blake3::hash(&text).as_bytes() == &head[16..]).then_some((sequence, text))
}
