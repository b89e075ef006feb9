//! Opens the sources, and reads them in batches without their holes.

use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use super::batch::{BATCH_BYTES, Batch, Work};
use super::diff::check_diff;
use super::format::{check_format, plain};
use super::input::Input;
use super::magic::HEAD;
use super::request::{ImportFile, ImportFormat, ImportRequest};
use super::stop::Stop;
use crate::error::{Error, Result};
use crate::store::write::stall;
use crate::store::{BLOCK_SIZE, FileKind};
use crate::sys::files::stream;
use crate::units::{PAGE_SIZE, to_usize};

const PAGES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE_SIZE;

impl ImportRequest {
    /// Opens the sources and returns them sorted by name, with warnings about them.
    pub(super) fn inputs(&self) -> Result<(Vec<Input>, Vec<String>)> {
        self.check()?;
        let mut files: Vec<&ImportFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut inputs: Vec<Input> = files.into_iter().map(Input::open).collect::<Result<_>>()?;
        for input in &mut inputs {
            input.must_be_plain = input.kind == FileKind::Ram && self.format != ImportFormat::Raw;
            input.is_diff = input.kind == FileKind::Ram && self.base.is_some();
        }
        let warnings = check_format(self.format, &inputs)?;
        if let Some(base) = &self.base {
            let diffs: Vec<&Input> = inputs.iter().filter(|input| input.is_diff).collect();
            let [diff] = diffs.as_slice() else {
                return Err(Error::usage(format!("a diff has one file of kind ram, not {}", diffs.len()))
                    .hint("import files of kind ram without --base"));
            };
            check_diff(diff, base.all_pages)?;
        }
        inputs.iter().filter_map(|i| i.size().map(|size| i.check_size(size))).collect::<Result<()>>()?;
        let mut total: u64 = 0;
        for input in &inputs {
            total = total.saturating_add(input.size().unwrap_or_default());
            input.check_total(total)?;
        }
        Ok((inputs, warnings))
    }
}

/// Returns the order in which inputs are read: those whose file is opened only after the others were read come last
/// ([`Input::is_late`]).
pub(super) fn order(inputs: &[Input]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..inputs.len()).collect();
    order.sort_by_key(|&at| inputs.get(at).is_some_and(Input::is_late));
    order
}

/// Reads all inputs in the order `order`. Fills batches from the channel `empty`, and passes each filled batch to
/// `send`.
pub(super) fn run(
    inputs: Vec<Input>,
    order: &[usize],
    stop: &Stop<'_>,
    empty: &Mutex<Vec<Batch>>,
    send: &mut dyn FnMut(Work) -> Result<()>,
) -> Result<()> {
    let mut inputs: Vec<Option<Input>> = inputs.into_iter().map(Some).collect();
    for &at in order {
        let Some(input) = inputs.get_mut(at).and_then(Option::take) else { continue };
        stop.check()?;
        let input = input.open_late()?;
        let size = match input.size() {
            Some(size) => read_file(&input, size, stop, empty, send).map(|()| size)?,
            None => read_stream(&input, stop, empty, send)?,
        };
        send(Work::End(size))?;
    }
    Ok(())
}

fn next_batch(stop: &Stop<'_>, empty: &Mutex<Vec<Batch>>) -> Result<Batch> {
    stop.check()?;
    let mut batch = empty.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
    batch.plain.resize(BATCH_BYTES, 0);
    batch.base_pages.clear();
    Ok(batch)
}

fn read_file(
    input: &Input,
    size: u64,
    stop: &Stop<'_>,
    empty: &Mutex<Vec<Batch>>,
    send: &mut dyn FnMut(Work) -> Result<()>,
) -> Result<()> {
    let mut offset = 0;
    while offset < size {
        let (start, end) = next_data(input, offset, size)?;
        if start > offset {
            send(match input.is_diff {
                true => Work::Base(offset / BLOCK_SIZE..start.div_ceil(BLOCK_SIZE)),
                false => Work::Zeros((start - offset).div_ceil(BLOCK_SIZE)),
            })?;
        }
        offset = start;
        while offset < end {
            let mut batch = next_batch(stop, empty)?;
            let length = to_usize((end - offset).min(BATCH_BYTES as u64));
            batch.length = length;
            if input.is_diff {
                batch.first_block = offset / BLOCK_SIZE;
                find_holes(input, offset..offset + length as u64, &mut batch.base_pages)?;
            }
            let read = input.file().and_then(|f| f.read_exact_at(&mut batch.plain[..length], offset));
            read.map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => input.changed("was truncated"),
                _ => input.fail(e),
            })?;
            offset += length as u64;
            send(Work::Data(batch))?;
        }
    }
    input.check_unchanged()
}

/// Returns the next range outside holes, widened to whole blocks; `(size, size)` if only a hole is left.
fn next_data(input: &Input, offset: u64, size: u64) -> Result<(u64, u64)> {
    let Some(data) = input.data_after(offset)? else { return Ok((size, size)) };
    let start = data.start / BLOCK_SIZE * BLOCK_SIZE;
    Ok((start.max(offset), data.end.next_multiple_of(BLOCK_SIZE).min(size)))
}

/// Sets in `pages` one bit mask for each block of this range: the pages in holes, lowest bit first.
fn find_holes(input: &Input, range: Range<u64>, pages: &mut Vec<u16>) -> Result<()> {
    let page_of = |offset: u64| (offset - range.start) / PAGE_SIZE;
    let bit = |page: u64| (to_usize(page / PAGES_PER_BLOCK), 1u16 << (page % PAGES_PER_BLOCK));
    pages.resize(to_usize((range.end - range.start).div_ceil(BLOCK_SIZE)), 0);
    for (block, bit) in (0..(range.end - range.start).div_ceil(PAGE_SIZE)).map(bit) {
        pages[block] |= bit;
    }
    let mut at = range.start;
    while let Some(data) = input.data_after(at)?.filter(|data| data.start < range.end) {
        // A page of which only a part is in a hole was written.
        let end = data.end.min(range.end);
        for (block, bit) in (page_of(data.start)..page_of(end.next_multiple_of(PAGE_SIZE))).map(bit) {
            pages[block] &= !bit;
        }
        at = end;
    }
    Ok(())
}

fn read_stream(
    input: &Input,
    stop: &Stop<'_>,
    empty: &Mutex<Vec<Batch>>,
    send: &mut dyn FnMut(Work) -> Result<()>,
) -> Result<u64> {
    let mut total = 0;
    let mut file = input.file().map_err(|e| input.fail(e))?;
    loop {
        let mut batch = next_batch(stop, empty)?;
        let mut have = 0;
        while have < BATCH_BYTES {
            wait_readable(input, stop, total + have as u64)?;
            match file.read(&mut batch.plain[have..]) {
                Ok(0) => break,
                Ok(count) => have += count,
                // The pipe is nonblocking: it was opened with this flag, or another process that shares the open file
                // description has set the flag.
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(input.fail(e)),
            }
        }
        total += have as u64;
        input.check_total(total)?;
        if total == have as u64 && input.must_be_plain {
            plain(input, batch.plain.get(..have.min(HEAD)).unwrap_or_default(), &[])?;
        }
        if have > 0 {
            batch.length = have;
            send(Work::Data(batch))?;
        }
        if have < BATCH_BYTES {
            input.check_size(total)?;
            return Ok(total);
        }
    }
}

fn wait_readable(input: &Input, stop: &Stop<'_>, have: u64) -> Result<()> {
    let file = input.file().map_err(|e| input.fail(e))?;
    if stream::wait_readable(file, stop.stall, || stop.check(), |e| input.fail(e))? {
        return Ok(());
    }
    Err(Error::try_again(format!(
        "the source of file '{}' stalled at offset {have}: no bytes for {} s; nothing was imported",
        input.name,
        stop.stall.unwrap_or_default().as_secs_f64()
    ))
    .at(input.origin())
    .hint(stall::REMEDY))
}
