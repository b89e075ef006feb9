//! Reasons that follow from the bytes of copied pages.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::code::{Code, Reasons};
use crate::clones::accounting::original::Originals;
use crate::clones::accounting::process::Measured;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::CloneProcess;
use crate::error::{Code as ErrorCode, Result};
use crate::store::Digest;
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::memory::process_memory::ProcessMemory;
use crate::units::{Bytes, PAGE_SIZE, PageCount, to_usize};

/// First half of a BLAKE3 hash: two of 2^32 different pages have the same one with a chance of about 2^-65.
type Hash = [u8; 16];

/// Copied pages of each template.
type Contents = BTreeMap<Digest, Copies>;

/// Copied pages of a template by the hash of their bytes.
#[derive(Default)]
struct Copies {
    /// Number of frames.
    frames: HashMap<Hash, u64>,
    /// The frames that other clones may have too, by a fork or KSM. Each counts once.
    shared: HashSet<(Hash, u64)>,
}

pub fn add(survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let (mut contents, mut originals) = (Contents::new(), Originals::default());
    for ((clone, measured), list) in survey.clones.iter().zip(&mut reasons.clones) {
        match compare(clone, measured, survey, &mut contents, &mut originals) {
            Ok((equal, zeros)) => {
                Reasons::push(list, Code::EqualToTemplate, equal);
                Reasons::push(list, Code::Zeros, zeros);
            }
            Err(error) if error.code() == ErrorCode::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for (digest, copies) in contents {
        // One of each remains.
        let superfluous: u64 = copies.frames.into_values().map(|frames| frames.saturating_sub(1)).sum();
        reasons.of_template(digest, Code::EqualCopies, PageCount::new(superfluous).bytes());
    }
    Ok(())
}

/// Returns the size of the copies that are equal to their page of the template, and of other copies that contain zeros.
/// Adds all other copies to `contents`.
fn compare(
    clone: &CloneProcess,
    measured: &Measured,
    survey: &Survey,
    contents: &mut Contents,
    originals: &mut Originals,
) -> Result<(Bytes, Bytes)> {
    let memory = ProcessMemory::open(clone.pid)?;
    let pagemap = measured.frames.private.may_be_shared().then(|| Pagemap::open(clone.pid)).transpose()?;
    // The process id may have been reused since the survey.
    if !clone.process().is_alive() {
        return Ok((Bytes::ZERO, Bytes::ZERO));
    }
    let (mut equal, mut zeros) = (PageCount::new(0), PageCount::new(0));
    let mut copy = vec![0; to_usize(PAGE_SIZE)];
    for (map, copied) in clone.maps.iter().zip(&measured.copied) {
        let Some(template) = survey.opened.get(&map.digest) else { continue };
        let present = copied.iter().filter(|copied| !copied.swapped);
        for address in present.flat_map(|copied| copied.range.clone().step_by(to_usize(PAGE_SIZE))) {
            if !memory.read(address, &mut copy)? {
                continue;
            }
            if copy == originals.page(template, map, address)? {
                equal += PageCount::new(1);
            } else if copy.iter().all(|byte| *byte == 0) {
                zeros += PageCount::new(1);
            } else {
                let (hash, copies) = (hash(&copy), contents.entry(map.digest).or_default());
                let frames = copies.frames.entry(hash).or_default();
                match &pagemap {
                    None => *frames += 1,
                    Some(pagemap) => pagemap.each_entry(address..address + PAGE_SIZE, |_, entry| {
                        let is_new = entry.frame().is_some_and(|frame| copies.shared.insert((hash, frame)));
                        *frames += u64::from(is_new);
                    })?,
                }
            }
        }
    }
    Ok((equal.bytes(), zeros.bytes()))
}

fn hash(page: &[u8]) -> Hash {
    let (mut half, whole) = (Hash::default(), blake3::hash(page));
    half.copy_from_slice(&whole.as_bytes()[..16]);
    half
}
