//! Zero runs of a template, which a backend maps as anonymous memory. A page of zeros that the guest reads is then the
//! kernel's zero page, not a page of the page cache, and a write to such a page reads no file.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::units::{FileOffset, HUGE_PAGE_SIZE, PAGE_SIZE};

/// Maximum number of zero runs of one backend; the longest are chosen. Each run splits a mapping, and so adds two
/// mappings, which cost 1 KiB of kernel memory, and time when clones are launched and measured. A process may have
/// 65530 mappings (`vm.max_map_count`).
const MAX_RUNS: usize = 32;

/// Returns the zero runs of memory of `length` bytes whose data is in these ranges, in bytes from the start of the
/// memory. Data ranges are sorted. A zero run consists of whole 2 MiB pages, so that the remaining parts of the file
/// can be mapped by PMDs.
///
/// The first and the last page of the memory are in no run: the mappings of the file enclose all runs, from which other
/// processes conclude that the whole range belongs to the template.
pub fn zero_runs(data: &[Range<u64>], length: u64) -> Vec<Range<u64>> {
    let last = length.saturating_sub(PAGE_SIZE);
    let ends = data.iter().map(|part| part.end);
    let starts = data.iter().map(|part| part.start.min(last)).chain([last]);
    let mut runs: Vec<Range<u64>> = std::iter::once(PAGE_SIZE)
        .chain(ends.map(|end| end.max(PAGE_SIZE)))
        .zip(starts)
        .map(|(start, end)| start.next_multiple_of(HUGE_PAGE_SIZE)..end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE)
        .filter(|run| !run.is_empty())
        .collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run.end - run.start));
    runs.truncate(MAX_RUNS);
    runs.sort_unstable_by_key(|run| run.start);
    runs
}

/// Returns the zero runs of `length` bytes of a file from `offset` on, from the file's holes (`SEEK_DATA`).
///
/// # Errors
/// Returns an error if lseek(2) fails.
pub fn zero_runs_of(file: &File, offset: FileOffset, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(offset.get() + at)) {
            Ok(start) => start - offset.get(),
            // No data up to the end of the file.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(offset.get() + start))? - offset.get();
        data.push(start..end);
        // No run can start before the next 2 MiB page, so holes and data before that page need no query.
        at = end.next_multiple_of(HUGE_PAGE_SIZE);
    }
    seek(file, SeekFrom::Start(0))?;
    Ok(zero_runs(&data, length))
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "the lists are of ranges")]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const HUGE: u64 = HUGE_PAGE_SIZE;

    #[test]
    fn runs_are_whole_huge_pages_without_the_first_and_the_last_page() {
        assert_eq!(zero_runs(&[], 8 * HUGE), [HUGE..7 * HUGE]);
        assert_eq!(zero_runs(&[], 8 * HUGE + PAGE_SIZE), [HUGE..8 * HUGE]);
        assert_eq!(zero_runs(&[0..1], 8 * HUGE), [HUGE..7 * HUGE]);
        assert_eq!(zero_runs(&[3 * HUGE - 1..3 * HUGE + 1], 8 * HUGE), [HUGE..2 * HUGE, 4 * HUGE..7 * HUGE]);
        assert_eq!(zero_runs(&[0..2 * HUGE, 3 * HUGE..8 * HUGE], 8 * HUGE), [2 * HUGE..3 * HUGE]);
        assert_eq!(zero_runs(&[0..2 * HUGE + 1, 3 * HUGE..8 * HUGE], 8 * HUGE), []);
        assert_eq!(zero_runs(&[0..8 * HUGE], 8 * HUGE), []);
        assert_eq!(zero_runs(&[0..9 * HUGE], 8 * HUGE), [], "data after the end of the memory");
        for length in [0, PAGE_SIZE, HUGE, 2 * HUGE] {
            assert_eq!(zero_runs(&[], length), [], "{length}");
        }
    }

    #[test]
    fn the_longest_runs_are_chosen() {
        // Runs of 1, 2, 3, … huge pages behind one huge page of data each.
        let mut at = 0;
        let data: Vec<_> = (1..=MAX_RUNS as u64 + 10)
            .map(|run| {
                let data = at..at + HUGE;
                at += (run + 1) * HUGE;
                data
            })
            .collect();
        let runs = zero_runs(&data, at + HUGE);
        assert_eq!(runs.len(), MAX_RUNS);
        assert_eq!(runs[0], data[10].end..data[11].start);
        assert!(runs.is_sorted_by_key(|run| run.start));
    }

    #[test]
    fn holes_of_a_file_are_runs() {
        let file = tempfile::tempfile().unwrap();
        let length = 16 * HUGE;
        file.set_len(length).unwrap();
        for block in [0, 5 * HUGE + (1 << 20), 5 * HUGE + (1 << 20) + (128 << 10), 15 * HUGE] {
            file.write_all_at(&[1; 4096], block).unwrap();
        }
        let runs = |offset, length| zero_runs_of(&file, FileOffset::new(offset), length).unwrap();
        assert_eq!(runs(0, length), [HUGE..5 * HUGE, 6 * HUGE..15 * HUGE]);
        assert_eq!(runs(3 * HUGE, 6 * HUGE), [HUGE..2 * HUGE, 3 * HUGE..5 * HUGE]);
        assert_eq!(seek(&file, SeekFrom::Current(0)).unwrap(), 0, "the position of the file is unchanged");
    }
}
