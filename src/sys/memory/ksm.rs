//! Figures of KSM, the kernel's merging of equal anonymous pages.

use std::path::Path;

use crate::sys::process::{procfs, tasks};

const PAGES_SHARED: &str = "/sys/kernel/mm/ksm/pages_shared";

/// Returns true if the kernel has merged pages of any process, or if this is unknown.
pub fn has_merged_pages() -> bool {
    let path = Path::new(PAGES_SHARED);
    match procfs::read_text(path) {
        Ok(text) => text.trim() != "0",
        // A kernel without KSM has no such file.
        Err(_) => path.exists(),
    }
}

/// Returns true if pages of a process are merged, or if the kernel has no figure for each process (before Linux 6.1).
pub fn has_merged_pages_of(pid: u32) -> bool {
    let thread = tasks::with_memory(pid).ok().flatten();
    let Some(text) = thread.and_then(|thread| procfs::read_text(&thread.join("ksm_stat")).ok()) else {
        return true;
    };
    parse(&text).is_none_or(|pages| pages > 0)
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("ksm_merging_pages")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_pages_of_a_process() {
        assert_eq!(parse("ksm_rmap_items 5\nksm_merging_pages 3\n"), Some(3));
        assert_eq!(parse("ksm_rmap_items 5\n"), None);
    }
}
