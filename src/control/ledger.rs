//! The ledger: what a supervisor writes down for its successor, as it lies in the memory file. It has two halves, written
//! in turn: a supervisor that is killed while it writes leaves the other one whole.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Length of a half.
pub const HALF: u64 = 16 << 20;
/// Number of the version, length and hash of the text.
pub const HEAD: usize = 8 + 8 + 32;

/// The newest whole text, and its number; `None` when it is no ledger, or holds nothing whole.
pub fn newest(file: &File) -> Option<(u64, Vec<u8>)> {
    [0, 1].into_iter().filter_map(|half| read_half(file, half)).max_by_key(|(turn, _)| *turn)
}

fn read_half(file: &File, half: u64) -> Option<(u64, Vec<u8>)> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, half * HALF).ok()?;
    let turn = u64::from_le_bytes(head[..8].try_into().ok()?);
    let length = u64::from_le_bytes(head[8..16].try_into().ok()?);
    if turn % 2 != half || length > HALF - HEAD as u64 {
        return None;
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, half * HALF + HEAD as u64).ok()?;
    (blake3::hash(&text).as_bytes() == &head[16..]).then_some((turn, text))
}
