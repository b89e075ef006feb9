//! The job of a zygote: the files that its workers map, and the pages that they touch.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::simulate::Simulate;
use crate::clones::counted;
use crate::clones::registry::Touched;
use crate::error::Result;
use crate::memory::{Options, Plan};

/// The job as the launcher sends it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The value of `--simulate`.
    pub simulate: String,
    /// Files to map.
    pub files: Vec<OrderFile>,
    /// Name of the file to touch.
    pub touch: String,
    /// How many pages to read and to write.
    pub touched: Touched,
    /// Pages of that file to copy before it is touched.
    pub prefault: Vec<Range<u64>>,
}

/// A file to map.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OrderFile {
    /// Name in the template.
    pub name: String,
    /// Path below the mount.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// True for a read-only mapping.
    pub rom: bool,
    /// Zero runs to map as anonymous memory, in bytes.
    pub zeros: Vec<Range<u64>>,
}

/// The parsed job, as the workers use it.
#[derive(Debug)]
pub struct Job {
    /// The value of `--simulate`.
    pub simulate: Simulate,
    /// Files to map.
    pub files: Vec<Mapped>,
    /// Name of the file to touch.
    pub touch: String,
    /// How many pages to read and to write.
    pub touched: Touched,
    /// Pages of that file to copy before it is touched.
    pub prefault: Vec<Range<u64>>,
}

/// A file to map, with the plan of its mapping.
#[derive(Debug)]
pub struct Mapped {
    /// Name in the template.
    pub name: String,
    /// True for a read-only mapping.
    pub rom: bool,
    /// Plan of the memory backend.
    pub plan: Plan,
    /// Zero runs to map as anonymous memory, in bytes.
    pub zeros: Vec<Range<u64>>,
}

impl Order {
    /// Returns the log of a clone that has touched its pages: the first lines, and the line about the touched pages.
    pub fn log(&self) -> [String; 2] {
        let mapped = self.files.iter().map(|file| {
            format!("mapped {} as {}\n", file.path.display(), if file.rom { "rom" } else { "ram" })
        });
        let touched = format!(
            "read {}, wrote {} of {}",
            counted(self.touched.read_pages, "page", "pages"),
            counted(self.touched.written_pages, "page", "pages"),
            self.touch
        );
        [mapped.collect(), touched]
    }
}

impl Job {
    /// Parses the job.
    ///
    /// # Errors
    /// Returns an error if an option of a file is invalid.
    pub fn new(order: Order) -> Result<Job> {
        let files = order.files.into_iter().map(|file| {
            let path = file.path.display().to_string().replace(',', ",,");
            let rom = if file.rom { "on" } else { "off" };
            let text = format!(
                "memory-backend-file,id=ram,size={},mem-path={path},share=off,readonly=on,rom={rom}",
                file.size
            );
            let plan = Options::parse(&text)?.plan()?;
            Ok(Mapped { name: file.name, rom: file.rom, plan, zeros: file.zeros })
        });
        Ok(Job {
            simulate: order.simulate.parse()?,
            files: files.collect::<Result<_>>()?,
            touch: order.touch,
            touched: order.touched,
            prefault: order.prefault,
        })
    }
}
