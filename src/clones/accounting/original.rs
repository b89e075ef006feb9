//! The bytes that a template has at an address of a mapping.

use crate::clones::find::TemplateMapping;
use crate::error::Result;
use crate::store::{Scratch, Template};
use crate::units::{FileOffset, PAGE_SIZE, to_usize};

/// Reads single pages of templates.
pub struct Originals {
    scratch: Scratch,
    page: Vec<u8>,
}

impl Default for Originals {
    fn default() -> Originals {
        Originals { scratch: Scratch::default(), page: vec![0; to_usize(PAGE_SIZE)] }
    }
}

impl Originals {
    /// Returns the page that a mapping of this template has at an address. The rest of the last page of a file is zero.
    ///
    /// # Errors
    /// Same as [`Template::read_range`].
    pub fn page(&mut self, template: &Template, map: &TemplateMapping, address: u64) -> Result<&[u8]> {
        let offset = map.offset.get() + address - map.start;
        let length = map.file_size.get().saturating_sub(offset).min(PAGE_SIZE);
        self.page.fill(0);
        let part = &mut self.page[..to_usize(length)];
        template.read_range(map.index, FileOffset::new(offset), &mut self.scratch, part)?;
        Ok(&self.page)
    }
}
