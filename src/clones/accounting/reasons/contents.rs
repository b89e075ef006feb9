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

/// Copied pages of each template by the hash of their bytes.
type Contents = BTreeMap<Digest, HashMap<blake3::Hash, Copies>>;

/// Copied pages with equal bytes.
#[derive(Default)]
struct Copies {
    /// Pages in frames that no other clone has.
    exclusive: u64,
    /// Frames of the other pages. A fork or KSM may have made clones share them.
    frames: HashSet<u64>,
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
    for (digest, pages) in contents {
        let frames = |copies: Copies| copies.exclusive + copies.frames.len() as u64;
        // One of each remains.
        let superfluous: u64 = pages.into_values().map(|copies| frames(copies).saturating_sub(1)).sum();
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
                let copies = contents.entry(map.digest).or_default().entry(blake3::hash(&copy)).or_default();
                match &pagemap {
                    None => copies.exclusive += 1,
                    Some(pagemap) => pagemap.each_entry(address..address + PAGE_SIZE, |_, entry| {
                        copies.frames.extend(entry.frame());
                    })?,
                }
            }
        }
    }
    Ok((equal.bytes(), zeros.bytes()))
}
