//! The clones that run now.

use std::path::{Path, PathBuf};

use super::recorded::{self, Recorded};
use super::resources::Bounds;
use crate::clones::accounting::{CloneMemory, Survey};
use crate::clones::find::COMMAND_NAME;
use crate::error::Result;
use crate::sys::process::{cgroup, procfs, times};
use crate::units::{Bytes, approximate};

/// A clone that runs now.
pub struct PresentClone {
    /// Its memory now.
    pub measured: Recorded,
    /// Size of its page tables.
    pub page_tables: Bytes,
    /// Processes and threads.
    pub tasks: u64,
    /// Lines of `/proc/PID/maps`.
    pub mappings: u64,
    /// Real user id.
    pub uid: u32,
    /// Directory of the cgroup that pays for its memory.
    pub cgroup: Option<PathBuf>,
}

impl PresentClone {
    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.measured.process.pid
    }

    /// Returns whether the cgroup with this directory, or one below, pays for its memory.
    pub fn is_inside(&self, directory: &Path) -> bool {
        self.cgroup.as_ref().is_some_and(|path| path.starts_with(directory))
    }
}

/// The clones that run now.
pub struct Present {
    /// All clones of the template.
    pub clones: Vec<PresentClone>,
}

impl Present {
    /// Inspects the clones of a survey.
    ///
    /// # Errors
    /// Returns an error if a process cannot be inspected.
    pub fn of(survey: &Survey) -> Result<Present> {
        let totals = &survey.density.totals;
        let alone = |m: &CloneMemory| m.private_bytes + m.page_table_bytes + m.overhead_bytes + m.disk_bytes;
        let sum: f64 = survey.density.clones.iter().map(|row| approximate(alone(&row.memory).get())).sum();
        let correction = recorded::share(totals.of_the_clones(), sum, totals.clones);
        let (mut clones, now) = (Vec::new(), times::since_boot());
        for ((clone, _), row) in survey.clones.iter().zip(&survey.density.clones) {
            // A process that keeps a working set in RAM maps the template too.
            if row.command == COMMAND_NAME {
                continue;
            }
            let start = times::start_since_boot(clone.pid)?;
            let (Some(start), Some((_, maps))) = (start, procfs::maps_text(clone.pid)?) else { continue };
            let mut tasks = 0;
            for process in clone.processes() {
                tasks += procfs::status(process.pid)?.map_or(0, |status| status.threads);
            }
            clones.push(PresentClone {
                measured: Recorded {
                    process: clone.process(),
                    age_seconds: now.saturating_sub(start).as_secs_f64(),
                    bytes: (approximate((alone(&row.memory) + row.memory.swap_bytes).get()) + correction)
                        .max(0.0),
                },
                page_tables: row.memory.page_table_bytes,
                tasks,
                mappings: maps.lines().count() as u64,
                uid: row.uid,
                cgroup: cgroup::memory_directory(clone.pid),
            });
        }
        Ok(Present { clones })
    }

    /// Returns least, mean and greatest of a figure. Returns `None` without clones.
    pub fn bounds(&self, figure: impl Fn(&PresentClone) -> u64) -> Option<Bounds> {
        let figures = || self.clones.iter().map(&figure);
        let count = self.clones.len() as u64;
        Some(Bounds {
            lower: figures().min()?,
            estimate: figures().sum::<u64>().div_ceil(count),
            upper: figures().max()?,
        })
    }
}
