//! Import of a diff snapshot: pages in holes of the memory file are those of a base template.
//!
//! Blocks wholly in a hole take hash and place from the base's tables, and no byte of them is read. Blocks partly in a
//! hole are completed from the base's block. The import holds the content lock, so that no collection moves a block.

use super::input::Input;
use crate::error::{Error, Result};
use crate::store::format::placement::Front;
use crate::store::write::block_index::Place;
use crate::store::{BLOCK_SIZE, Digest, Scratch, Store, Template};
use crate::units::{PAGE_SIZE, to_usize};

/// The memory of the base.
pub(super) struct BaseMemory {
    template: Template,
    file: usize,
    /// The placement when the import began.
    front: Front,
}

impl BaseMemory {
    /// Opens the base of this diff. The caller holds the content lock.
    pub fn open(store: &Store, digest: &Digest, diff: &Input) -> Result<BaseMemory> {
        let template = store.template(digest)?;
        let memory = template.roles()?.memory.and_then(|name| template.file(&name));
        let Some(file) = memory else {
            return Err(Error::usage(format!(
                "the base {digest} has no RAM file, or several of which none is named 'memory'"
            ))
            .hint("choose the template that was imported from the base of the diff"));
        };
        let (size, expected) = (diff.size().unwrap_or_default(), template.files()[file].size.get());
        if size != expected {
            return Err(Error::usage(format!(
                "the diff has {size} bytes, but the memory of the base {digest} has {expected}"
            ))
            .at(diff.origin())
            .hint("choose the template that was imported from the base of this diff"));
        }
        let front = template.front();
        Ok(BaseMemory { template, file, front })
    }

    /// Returns hash and place of a block, or `None` for a zero block.
    pub fn place(&self, block: u64) -> Result<Option<(Digest, Place)>> {
        let found = self.template.place(self.file, block)?;
        Ok(found.map(|(hash, pack, stored)| (hash, Place { pack, stored })))
    }

    /// Copies the pages in the bit mask `pages` (lowest bit first) of the base's block into `out`.
    pub fn complete(
        &self,
        block: u64,
        pages: u16,
        out: &mut [u8],
        (scratch, buffer): (&mut Scratch, &mut Vec<u8>),
    ) -> Result<()> {
        buffer.resize(to_usize(BLOCK_SIZE), 0);
        self.template.read_block(self.file, block, scratch, buffer)?;
        let (out, base) = (out.chunks_mut(to_usize(PAGE_SIZE)), buffer.chunks(to_usize(PAGE_SIZE)));
        for (page, (out, base)) in out.zip(base).enumerate() {
            if pages & (1 << page) != 0 {
                out.copy_from_slice(base);
            }
        }
        Ok(())
    }

    /// Returns an error if another import has repaired the base since this import opened the base: the records that
    /// this import took from the base's tables may be damaged.
    pub fn check_unchanged(&self, store: &Store) -> Result<()> {
        match store.template(self.template.digest())?.front() == self.front {
            true => Ok(()),
            false => Err(Error::try_again(format!(
                "the base {} was repaired during the import; nothing was imported",
                self.template.digest()
            ))),
        }
    }
}

/// Warning about a diff without a changed page of zeros: `cp` and `rsync -S` make holes of such pages, which cannot be
/// distinguished from the holes that Firecracker has left.
pub(super) const NO_ZERO_PAGE: &str = "no changed page of the diff is zero; if the file was copied with cp or rsync -S, \
                                       zero pages became holes and now have the base's content: import the original \
                                       file";

/// Checks that the holes of this file can be those of a diff.
pub(super) fn check_diff(input: &Input, all_pages: bool) -> Result<()> {
    let Some(unit) = input.hole_unit()? else {
        return Err(Error::usage("a diff must be a regular file, because its holes have a meaning")
            .at(input.origin())
            .hint("write the diff to a regular file on ext4, XFS or Btrfs"));
    };
    if unit > PAGE_SIZE {
        return Err(Error::usage(format!(
            "the file system of the diff allocates {unit} bytes at a time: a hole of one page ({PAGE_SIZE} bytes) is lost"
        ))
        .at(input.origin())
        .hint("take the diff again, into a file on ext4, XFS or Btrfs; a copy would not bring the holes back"));
    }
    if input.hole_bytes()? == 0 && !all_pages {
        return Err(Error::usage("the diff has no hole: every page would count as changed")
            .at(input.origin())
            .hint(
                "import the original diff, or a copy by 'tar --sparse', which keeps the holes; import a diff \
                 that really has every page with --all-pages, and a full snapshot without --base",
            ));
    }
    Ok(())
}
