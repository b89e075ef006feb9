//! Who holds a lock of a file, as `/proc/locks` lists it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

use super::procfs::read_text;

/// Processes that have locked the file with flock(2), as far as they can be seen: none of another PID namespace, and on
/// filesystems that show another device than they have (btrfs) nobody.
pub fn flock_holders(file: &File) -> Vec<u32> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let Ok(text) = read_text(Path::new("/proc/locks")) else { return Vec::new() };
    let place = format!("{:02x}:{:02x}:{}", major(meta.dev()), minor(meta.dev()), meta.ino());
    holders(&text, &place)
}

fn holders(text: &str, place: &str) -> Vec<u32> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        // One that waits has an arrow there.
        let is_lock = words.next()? == "FLOCK";
        let pid = words.nth(2)?.parse().ok()?;
        (is_lock && pid != 0 && words.next()? == place).then_some(pid)
    });
    let mut pids: Vec<u32> = lines.collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FlockOperation, flock};

    #[test]
    fn holders_are_told_from_those_who_wait() {
        let text = "1: FLOCK  ADVISORY  READ  30 fe:00:77 0 EOF\n\
                    1: -> FLOCK  ADVISORY  WRITE 31 fe:00:77 0 EOF\n\
                    2: FLOCK  ADVISORY  READ  12 fe:00:77 0 EOF\n\
                    3: FLOCK  ADVISORY  READ  0 fe:00:77 0 EOF\n\
                    4: POSIX  ADVISORY  READ  13 fe:00:77 0 EOF\n\
                    5: FLOCK  ADVISORY  READ  14 fe:00:777 0 EOF\n\
                    6: FLOCK\n\nnothing of that kind\n";
        assert_eq!(holders(text, "fe:00:77"), [12, 30]);
    }

    #[test]
    fn the_kernel_names_us() {
        let file = tempfile::tempfile().unwrap();
        assert!(flock_holders(&file).is_empty());
        flock(&file, FlockOperation::LockShared).unwrap();
        assert_eq!(flock_holders(&file), [std::process::id()]);
    }
}
