//! Reasons that follow from the bytes of copied pages.

use std::collections::{BTreeMap, HashMap};

use super::code::{Code, Reasons};
use crate::clones::accounting::process::Measured;
use crate::clones::accounting::survey::Survey;
use crate::clones::find::CloneProcess;
use crate::error::{Code as ErrorCode, Result};
use crate::store::{Digest, Scratch};
use crate::sys::memory::process_memory::ProcessMemory;
use crate::units::{Bytes, FileOffset, PAGE_SIZE, PageCount, to_usize};

/// Copied pages of each template by the hash of their bytes, and how often each occurs.
type Contents = BTreeMap<Digest, HashMap<blake3::Hash, u64>>;

pub fn add(survey: &Survey, reasons: &mut Reasons) -> Result<()> {
    let (mut contents, mut scratch) = (Contents::new(), Scratch::default());
    for ((clone, measured), list) in survey.clones.iter().zip(&mut reasons.clones) {
        match compare(clone, measured, survey, &mut contents, &mut scratch) {
            Ok((equal, zeros)) => {
                Reasons::push(list, Code::EqualToTemplate, equal);
                Reasons::push(list, Code::Zeros, zeros);
            }
            Err(error) if error.code() == ErrorCode::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for (digest, pages) in contents {
        // One of each remains.
        let superfluous: u64 = pages.into_values().map(|count| count - 1).sum();
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
    scratch: &mut Scratch,
) -> Result<(Bytes, Bytes)> {
    let memory = ProcessMemory::open(clone.pid)?;
    // The process id may have been reused since the survey.
    if !clone.process().is_alive() {
        return Ok((Bytes::ZERO, Bytes::ZERO));
    }
    let (mut equal, mut zeros) = (PageCount::new(0), PageCount::new(0));
    let (mut copy, mut original) = (vec![0; to_usize(PAGE_SIZE)], vec![0; to_usize(PAGE_SIZE)]);
    for (map, copied) in clone.maps.iter().zip(&measured.copied) {
        let Some(template) = survey.opened.get(&map.digest) else { continue };
        let present = copied.iter().filter(|copied| !copied.swapped);
        for address in present.flat_map(|copied| copied.range.clone().step_by(to_usize(PAGE_SIZE))) {
            if !memory.read(address, &mut copy)? {
                continue;
            }
            let offset = map.offset.get() + address - map.start;
            // The rest of the last page of a file is zero in a mapping.
            original.fill(0);
            let length = map.file_size.get().saturating_sub(offset).min(PAGE_SIZE);
            let part = &mut original[..to_usize(length)];
            template.read_range(map.index, FileOffset::new(offset), scratch, part)?;
            if copy == original {
                equal += PageCount::new(1);
            } else if copy.iter().all(|byte| *byte == 0) {
                zeros += PageCount::new(1);
            } else {
                *contents.entry(map.digest).or_default().entry(blake3::hash(&copy)).or_default() += 1;
            }
        }
    }
    Ok((equal.bytes(), zeros.bytes()))
}
