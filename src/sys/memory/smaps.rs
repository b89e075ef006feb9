//! The mappings of a process with the flags of their memory, from `/proc/PID/smaps`.

use std::fs;

use crate::error::{Error, Result};
use crate::sys::process::procfs::{self, MapLine};
use crate::sys::process::tasks;

/// A mapping and its `VmFlags`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlaggedMapping {
    /// The mapping.
    pub line: MapLine,
    /// Words of two letters (proc_pid_smaps(5)).
    flags: String,
}

impl FlaggedMapping {
    /// Returns true for locked memory (mlock(2), mlockall(2)).
    pub fn is_locked(&self) -> bool {
        self.has("lo")
    }

    /// Returns true after `MADV_HUGEPAGE`.
    pub fn wants_huge_pages(&self) -> bool {
        self.has("hg")
    }

    /// Returns true after `MADV_NOHUGEPAGE`, which forbids 2 MiB entries for pages of files too.
    pub fn forbids_huge_pages(&self) -> bool {
        self.has("nh")
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.split_ascii_whitespace().any(|word| word == flag)
    }
}

/// Returns the mappings of a process by address, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if the process cannot be inspected.
pub fn of(pid: u32) -> Result<Option<Vec<FlaggedMapping>>> {
    let text = tasks::through_memory(pid, |folder| {
        let text = fs::read(folder.join("smaps"))?;
        Ok((!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned()))
    });
    let text = text.map_err(|e| Error::io("cannot read mappings", format!("/proc/{pid}/smaps"), e))?;
    Ok(text.map(|text| parse(&text)))
}

/// Parses the text of a `smaps` file. A mapping without flags is left out.
fn parse(text: &str) -> Vec<FlaggedMapping> {
    let (mut mappings, mut current) = (Vec::new(), None);
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            mappings.extend(current.take().map(|line| FlaggedMapping { line, flags: flags.to_owned() }));
        } else if let Some(line) = procfs::parse_maps(line, |_, _| true).pop() {
            current = Some(line);
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    #[test]
    fn parses_mappings_with_their_flags() {
        let text = "\
7f0000000000-7f0000200000 rw-p 00100000 00:2f 77   /mnt/by-id/ab/memory
Size:               2048 kB
VmFlags: rd wr mr mw me lo hg sd
7f0000200000-7f0000201000 ---p 00000000 00:00 0
Size:                  4 kB
7f0000300000-7f0000301000 r--s 00000000 00:2f 78   /mnt/x
Size:                  4 kB
VmFlags: rd mr me ms nh
";
        let all = parse(text);
        assert_eq!(all.len(), 2, "a mapping without flags is left out");
        assert_eq!((all[0].line.ino, all[1].line.ino), (77, 78));
        assert!(all[0].is_locked() && all[0].wants_huge_pages() && !all[0].forbids_huge_pages());
        assert!(!all[1].is_locked() && !all[1].wants_huge_pages() && all[1].forbids_huge_pages());
    }

    #[test]
    fn reads_this_process() {
        let here = vec![7u8; 2 * PAGE_SIZE as usize];
        let all = of(std::process::id()).unwrap().unwrap();
        let address = here.as_ptr() as u64;
        assert!(all.iter().any(|mapping| (mapping.line.start..mapping.line.end).contains(&address)));
        assert_eq!(of(u32::MAX >> 1).unwrap(), None);
    }
}
