//! The file of a recording: appending, thinning out at the maximum size, and reading.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::sample::{Header, Sample, Time};
use super::thin::{Line, keep};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::units::{Bytes, to_usize};

/// Maximum length of a line: a sample of about 500,000 clones.
const MAX_LINE: u64 = 256 << 20;

/// Maximum length of the header.
const MAX_HEADER: u64 = 4096;

/// Warning about a last line that a crash has cut.
const UNREADABLE: &str = "dropping an incomplete or unreadable last sample";

/// Size of a read when searching backwards for a line feed.
const CHUNK: u64 = 64 << 10;

/// A recording that is open for reading. Samples that are appended later are not read.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    file: File,
    /// Offset of the first sample.
    start: u64,
    /// End of the last complete line.
    end: u64,
}

impl Recording {
    /// Opens a recording, also while a recorder appends to it.
    ///
    /// # Errors
    /// Returns [`Code::NotFound`](crate::error::Code) if the file does not exist, and
    /// [`Code::Usage`](crate::error::Code) if the file is not a recording that this program can read.
    pub fn open(path: &Path) -> Result<Recording> {
        let (folder, name) = folder_of(path)?;
        let file = folder.file(&name).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::not_found("no such recording")
                .at(path)
                .hint("write a recording with 'stencil record FILE'"),
            _ => Error::io("cannot read the recording", path, e),
        })?;
        Recording::of(path.to_owned(), file)
    }

    fn of(path: PathBuf, file: File) -> Result<Recording> {
        let failed = |e| Error::io("cannot read the recording", &path, e);
        let length = file.metadata().map_err(failed)?.len();
        let end = end_of_last_line(&file, length).map_err(failed)?;
        let mut first = Vec::new();
        let mut reader = BufReader::new(Part { file: &file, offset: 0, end: end.min(MAX_HEADER) });
        reader.read_until(b'\n', &mut first).map_err(failed)?;
        let header = serde_json::from_slice::<Header>(&first).ok().filter(Header::is_of_recording);
        match header {
            Some(header) if header.is_supported() => {}
            Some(header) => {
                let message = format!("unsupported version {} of a recording", header.version());
                return Err(Error::usage(message).at(&path).hint("use the version of stencil that wrote it"));
            }
            None => {
                return Err(Error::usage("the file is not a recording")
                    .at(&path)
                    .hint("name a file that 'stencil record' has written"));
            }
        }
        Ok(Recording { path, start: first.len() as u64, file, end })
    }

    /// Returns the path of the recording.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Iterates over the samples in the order in which they were taken. Can be called again.
    ///
    /// The items are errors if the file cannot be read, and [`Code::Damage`](crate::error::Code) for a line that is not a
    /// sample and has another line behind it. Nothing follows an error.
    pub fn samples(&self) -> Samples<'_> {
        Samples(self.lines())
    }

    fn lines(&self) -> Lines<'_> {
        let part = Part { file: &self.file, offset: self.start, end: self.end };
        Lines {
            path: &self.path,
            reader: BufReader::new(part),
            number: 1,
            start: self.start,
            end: self.end,
            is_over: false,
        }
    }
}

/// An iterator over the samples of a recording.
#[derive(Debug)]
pub struct Samples<'a>(Lines<'a>);

impl Iterator for Samples<'_> {
    type Item = Result<Sample>;

    fn next(&mut self) -> Option<Result<Sample>> {
        let found: Result<(_, Sample)> = self.0.parse_next()?;
        Some(found.and_then(|(_, sample)| match sample.problem() {
            None => Ok(sample),
            Some(field) => Err(self.0.damage(&format_args!("{field} has a number that is out of bounds"))),
        }))
    }
}

/// A part of a file.
#[derive(Debug)]
struct Part<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(to_usize(self.end.saturating_sub(self.offset)));
        let read = self.file.read_at(&mut buffer[..length], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// The complete lines after the header.
#[derive(Debug)]
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<Part<'a>>,
    /// Number of lines before, counted from the header.
    number: u64,
    /// Offset of the next line.
    start: u64,
    /// End of the last line.
    end: u64,
    is_over: bool,
}

impl Lines<'_> {
    /// Returns an error about the line that was read last.
    fn damage(&mut self, why: &dyn std::fmt::Display) -> Error {
        self.is_over = true;
        Error::damage(format!("line {} is not a sample: {why}", self.number))
            .at(self.path)
            .hint("remove the line from a copy of the recording")
    }

    /// Returns the next line with its place in the file. Nothing follows an error. A last line that cannot be parsed was
    /// cut by a crash, and is left out.
    fn parse_next<T: DeserializeOwned>(&mut self) -> Option<Result<((u64, u64), T)>> {
        if self.is_over {
            return None;
        }
        let mut text = Vec::new();
        let read = self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut text);
        match read {
            Ok(0) => None,
            Ok(_) => {
                let (start, length) = (self.start, text.len() as u64);
                let parsed = serde_json::from_slice(&text);
                if parsed.is_err() && start + length == self.end {
                    log::warn!("{}: {UNREADABLE}", self.path.display());
                    self.is_over = true;
                    return None;
                }
                self.start += length;
                self.number += 1;
                Some(parsed.map(|found| ((start, length), found)).map_err(|e| self.damage(&e)))
            }
            Err(e) => {
                self.is_over = true;
                Some(Err(Error::io("cannot read the recording", self.path, e)))
            }
        }
    }
}

/// Returns the offset behind the last line feed, 0 without one. Bytes behind it are an incomplete line.
fn end_of_last_line(file: &File, length: u64) -> io::Result<u64> {
    let mut end = length;
    while end > 0 && length - end <= MAX_LINE {
        let start = end.saturating_sub(CHUNK);
        let mut chunk = vec![0; to_usize(end - start)];
        file.read_exact_at(&mut chunk, start)?;
        if let Some(at) = chunk.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Opens the directory of a file that the user named, after resolving symbolic links.
fn folder_of(path: &Path) -> Result<(Directory, OsString)> {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().ok_or_else(|| {
        Error::usage("the path of a recording has no file name").at(path).hint("name a file")
    })?;
    let folder = match real.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let opened = Directory::open(folder).map_err(|e| Error::io("cannot open the directory", folder, e))?;
    Ok((opened, name.to_owned()))
}

/// The time of a sample, for the list of lines.
#[derive(Deserialize)]
struct Timed {
    time: Time,
}

/// A recording that this process appends to, and no other process.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    folder: Directory,
    name: OsString,
    /// Locked.
    file: File,
    lines: Vec<Line>,
    /// Length of the header and all lines.
    length: u64,
    max_size: Bytes,
}

impl Recorder {
    /// Opens a recording for appending, or creates the recording. An incomplete or unreadable last line is cut off.
    ///
    /// # Errors
    /// Returns [`Code::InUse`](crate::error::Code) if another recorder has the file,
    /// [`Code::Usage`](crate::error::Code) if the file is not a recording, and [`Code::Damage`](crate::error::Code) if one
    /// of its other lines is not a sample.
    pub fn open(path: &Path, max_size: Bytes) -> Result<Recorder> {
        let (folder, name) = folder_of(path)?;
        let file = lock(path, &folder, &name)?;
        let failed = |e| Error::io("cannot write the recording", path, e);
        // A recorder that was killed may have left it.
        let _ = folder.remove_file(thinned(&name));
        let header = header_line()?;
        let length = file.metadata().map_err(failed)?.len();
        if end_of_last_line(&file, length).map_err(failed)? == 0 {
            // Empty, or the recorder was killed while it wrote the header.
            let mut found = vec![0; to_usize(length.min(MAX_HEADER))];
            file.read_exact_at(&mut found, 0).map_err(failed)?;
            if header.starts_with(&found) {
                file.write_all_at(&header, 0).and_then(|()| file.sync_all()).map_err(failed)?;
                folder.sync().map_err(failed)?;
            }
        }
        let recording = Recording::of(path.to_owned(), file)?;
        let (mut lines, mut all) = (Vec::new(), recording.lines());
        while let Some(line) = all.parse_next::<Timed>() {
            let ((start, length), Timed { time }) = line?;
            lines.push(Line { start, length, time });
        }
        let mut length = all.start;
        // The list of lines needs only their times.
        if let Some(last) = lines.last() {
            let mut text = vec![0; to_usize(last.length)];
            recording.file.read_exact_at(&mut text, last.start).map_err(failed)?;
            if serde_json::from_slice::<Sample>(&text).is_err() {
                length = last.start;
                lines.pop();
            }
        }
        let Recording { path, file, .. } = recording;
        let is_cut =
            file.metadata().map_err(|e| Error::io("cannot read the recording", &path, e))?.len() > length;
        if is_cut {
            log::warn!("{}: {UNREADABLE}", path.display());
            file.set_len(length).map_err(|e| Error::io("cannot write the recording", &path, e))?;
        }
        Ok(Recorder { path, folder, name, file, lines, length, max_size })
    }

    /// Returns the number of samples in the file.
    pub fn samples(&self) -> usize {
        self.lines.len()
    }

    /// Returns the length of the file.
    pub fn length(&self) -> Bytes {
        Bytes::new(self.length)
    }

    /// Returns false if the file was moved or removed.
    pub fn is_in_place(&self) -> bool {
        is_at(&self.file, &self.folder, &self.name)
    }

    /// Appends a sample durably. If the file would become larger than its maximum size, earlier samples are thinned out
    /// before.
    ///
    /// # Errors
    /// Returns an error if the first, the last and the new sample together exceed the maximum size, if the file was moved
    /// or removed, or if a system call fails. The samples in the file are kept.
    pub fn append(&mut self, sample: &Sample) -> Result<()> {
        let mut text = serde_json::to_vec(sample)
            .map_err(|e| Error::failed("cannot write a sample as JSON").because(e.into()))?;
        text.push(b'\n');
        let length = text.len() as u64;
        if !self.is_in_place() {
            return Err(Error::failed("the recording was moved or removed while it was written")
                .at(&self.path)
                .hint("run the command again to write a new recording"));
        }
        if self.length + length > self.max_size.get() {
            self.make_room(length)?;
        }
        let written = self.file.write_all_at(&text, self.length).and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            // The next sample must not follow half a line. If this fails too, the next sample overwrites the half line.
            let _ = self.file.set_len(self.length);
            return Err(self.failed(e));
        }
        self.lines.push(Line { start: self.length, length, time: sample.time });
        self.length += length;
        Ok(())
    }

    fn failed(&self, e: io::Error) -> Error {
        Error::io("cannot write the recording", &self.path, e)
    }

    /// Thins the samples out, to at most half of the maximum size, so that a line of this length fits.
    fn make_room(&mut self, length: u64) -> Result<()> {
        let header = header_line()?;
        let (used, max) = (header.len() as u64 + length, self.max_size.get());
        let ends = self.lines.first().into_iter().chain(self.lines.last().filter(|_| self.lines.len() > 1));
        let least: u64 = used + ends.map(|line| line.length).sum::<u64>();
        if least > max {
            return Err(Error::usage(format!(
                "the first, the last and a new sample take {}, more than the maximum size {} of the recording",
                Bytes::new(least),
                self.max_size
            ))
            .at(&self.path)
            .hint("set a larger --max-size, or write a new recording"));
        }
        let kept = keep(&self.lines, (max / 2).min(max - used));
        // Only the holder of the lock writes this name; a killed one may have left it.
        let temporary = thinned(&self.name);
        let _ = self.folder.remove_file(&temporary);
        let write = |recorder: &Recorder| -> io::Result<(File, Vec<Line>, u64)> {
            let mode = recorder.file.metadata()?.mode() & 0o777;
            let file = recorder.folder.create(&temporary, mode)?;
            let mut out = BufWriter::new(&file);
            out.write_all(&header)?;
            let (mut lines, mut end) = (Vec::with_capacity(kept.len()), header.len() as u64);
            for Line { start, length, time } in &kept {
                let mut text = vec![0; to_usize(*length)];
                recorder.file.read_exact_at(&mut text, *start)?;
                out.write_all(&text)?;
                lines.push(Line { start: end, length: *length, time: *time });
                end += length;
            }
            out.flush()?;
            drop(out);
            // Before the new file has its name: no other recorder gets between.
            if !file_locks::wait(&file, true, Duration::ZERO, || false)? {
                return Err(ErrorKind::WouldBlock.into());
            }
            file.sync_all()?;
            recorder.folder.rename(&temporary, &recorder.folder, &recorder.name)?;
            recorder.folder.sync()?;
            Ok((file, lines, end))
        };
        let written = write(self).inspect_err(|_| drop(self.folder.remove_file(&temporary)));
        (self.file, self.lines, self.length) = written.map_err(|e| self.failed(e))?;
        log::info!("{}: thinned out to {} samples", self.path.display(), self.lines.len());
        Ok(())
    }
}

/// Returns the name of the file that replaces a recording.
fn thinned(name: &OsStr) -> OsString {
    let mut thinned = OsString::from(".");
    thinned.push(name);
    thinned.push(".thinned");
    thinned
}

fn header_line() -> Result<Vec<u8>> {
    let text = serde_json::to_vec(&Header::default());
    let mut text = text.map_err(|e| Error::failed("cannot write a header as JSON").because(e.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// Opens and locks the file. While this process waits for nothing, the holder of the lock may replace the file, so the
/// name is checked after the lock.
fn lock(path: &Path, folder: &Directory, name: &OsStr) -> Result<File> {
    let failed = |e| Error::io("cannot write the recording", path, e);
    loop {
        let (file, _) = folder.open_or_create(name, 0o600).map_err(failed)?;
        if !file_locks::wait(&file, true, Duration::ZERO, || false).map_err(failed)? {
            let holders = file_locks::flock_holders(&file);
            let by = holders.first().map_or_else(String::new, |pid| format!(" (process {pid})"));
            return Err(Error::in_use(format!("another recorder writes this recording{by}"))
                .at(path)
                .hint("stop the other recorder, or name another file"));
        }
        if is_at(&file, folder, name) {
            return Ok(file);
        }
    }
}

/// Returns true if the name still leads to this file.
fn is_at(file: &File, folder: &Directory, name: &OsStr) -> bool {
    let (Ok(ours), Ok(named)) = (file.metadata(), folder.metadata(name)) else { return false };
    (ours.dev(), ours.ino()) == (named.st_dev, named.st_ino)
}

#[cfg(test)]
mod tests;
