//! Export of a template's file: the plain bytes, complete or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::disk::publish::random_hex;
use crate::store::format::codec::is_zero;
use crate::store::{BLOCK_SIZE, Scratch, Template};
use crate::sys::files::stream::Sink;
use crate::sys::process::threads;
use crate::units::{Bytes, PAGE_SIZE, to_usize};

/// Blocks that a thread exports between two accesses to the shared counter.
const BLOCKS_PER_TURN: u64 = 64;

impl Template {
    /// Writes one file of the template to the file `out`, which appears atomically, as described for [`Target`]. Zero
    /// pages become holes if `sparse` is true. All cores decode. If `out` is a named pipe, waits for a reader at most
    /// `stall`; a zero `stall` means no limit.
    ///
    /// # Errors
    /// Returns [`Code::Damage`](crate::error::Code) if a block is damaged. Returns an error if `out` cannot be written,
    /// if `out` is a file and `replace` is false, or if `interrupt` becomes true.
    pub fn export_file(
        &self,
        file: usize,
        (out, replace, sparse): (&Path, bool, bool),
        (interrupt, stall): (&AtomicBool, Duration),
        progress: &dyn Progress,
    ) -> Result<()> {
        if let Ok(meta) = fs::metadata(out)
            && !meta.is_file()
        {
            let kind = meta.file_type();
            if kind.is_fifo() || kind.is_char_device() {
                let mut stream = Sink::open(out, Some(stall), Some(interrupt))?;
                return self.export_stream(file, out, &mut stream, interrupt, progress);
            }
            return Err(Error::usage(
                "cannot export: the path exists and is not a regular file, named pipe or character device",
            )
            .at(out)
            .hint("name a new file, or '-' for standard output"));
        }
        let target = Target::create(out, replace)?;
        let size = self.files().get(file).map_or(0, |f| f.size.get());
        target.file.set_len(size).map_err(|e| Error::io("cannot write", out, e))?;
        progress.start("export", Some(Bytes::new(size)));
        let written = self.write_blocks(file, (&target.file, out, sparse), interrupt, progress);
        progress.finish();
        written?;
        target.publish()
    }

    /// Writes one file of the template to a stream, in order, zeros included. Every byte is verified before it is
    /// written; after an error the stream ends early. Error messages call the stream `name`.
    ///
    /// # Errors
    /// Same as [`Template::export_file`].
    pub fn export_stream(
        &self,
        file: usize,
        name: &Path,
        out: &mut dyn Write,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (mut scratch, mut block) = (Scratch::default(), vec![0; to_usize(BLOCK_SIZE)]);
        progress.start("export", self.files().get(file).map(|f| f.size));
        let blocks = self.block_count(file);
        let written = (0..blocks).try_for_each(|number| {
            check(interrupt)?;
            scratch.announce(BLOCKS_PER_TURN.min(blocks - 1 - number));
            let length = self.read_block(file, number, &mut scratch, &mut block)?;
            out.write_all(&block[..length]).map_err(|e| Error::io("cannot write the export", name, e))?;
            progress.advance(Bytes::new(length as u64));
            Ok(())
        });
        progress.finish();
        written?;
        out.flush().map_err(|e| Error::io("cannot write the export", name, e))
    }

    fn write_blocks(
        &self,
        file: usize,
        (target, out, sparse): (&File, &Path, bool),
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let next = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let blocks = self.block_count(file);
        let work = || -> Result<()> {
            let (mut scratch, mut block) = (Scratch::default(), vec![0; to_usize(BLOCK_SIZE)]);
            while !failed.load(Ordering::Relaxed) {
                let start = next.fetch_add(BLOCKS_PER_TURN, Ordering::Relaxed);
                if start >= blocks {
                    break;
                }
                check(interrupt)?;
                let end = (start + BLOCKS_PER_TURN).min(blocks);
                for number in start..end {
                    scratch.announce(end - 1 - number);
                    if !sparse || self.block_id(file, number)?.is_some() {
                        let length = self.read_block(file, number, &mut scratch, &mut block)?;
                        let (block, offset) = (&block[..length], number * BLOCK_SIZE);
                        match sparse {
                            true => write_pages(target, offset, block),
                            false => target.write_all_at(block, offset),
                        }
                        .map_err(|e| Error::io("cannot write", out, e))?;
                    }
                    progress.advance(Bytes::new(BLOCK_SIZE));
                }
            }
            Ok(())
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        threads::share(threads, || work().inspect_err(|_| failed.store(true, Ordering::Relaxed)))
    }
}

fn check(interrupt: &AtomicBool) -> Result<()> {
    match interrupt.load(Ordering::Relaxed) {
        true => Err(Error::failed("interrupted; nothing was exported")),
        false => Ok(()),
    }
}

/// Writes the pages that are not zero; adjacent pages in one write.
fn write_pages(file: &File, offset: u64, block: &[u8]) -> io::Result<()> {
    let mut run: Option<usize> = None;
    for (start, page) in (0..).step_by(to_usize(PAGE_SIZE)).zip(block.chunks(to_usize(PAGE_SIZE))) {
        match (is_zero(page), run) {
            (false, None) => run = Some(start),
            (true, Some(from)) => {
                file.write_all_at(&block[from..start], offset + from as u64)?;
                run = None;
            }
            _ => {}
        }
    }
    run.map_or(Ok(()), |from| file.write_all_at(&block[from..], offset + from as u64))
}

/// A new file that appears at its path only when it is complete. The file has no name (`O_TMPFILE`) until it is
/// published, so that nothing is left behind if the process is killed. Only its owner may read the file (mode 0600),
/// because it contains guest memory or data derived from it.
#[derive(Debug)]
pub struct Target {
    out: PathBuf,
    replace: bool,
    file: File,
    /// Name of the unfinished file, on a file system without `O_TMPFILE`.
    temporary: Option<PathBuf>,
}

impl Target {
    /// Creates a file, to be published as `out`. A file at `out` is replaced if `replace` is true; if `out` is a
    /// symbolic link, its target is replaced.
    ///
    /// # Errors
    /// Same as [`Target::check`]. Also returns an error if the directory of `out` cannot be written.
    pub fn create(out: &Path, replace: bool) -> Result<Target> {
        Target::check(out, replace)?;
        let out = fs::canonicalize(out).unwrap_or_else(|_| out.to_owned());
        let directory = directory_of(&out);
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(Target { out, replace, file: file.into(), temporary: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let path = temporary_name(&out)?;
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
                let file = file.map_err(|e| Error::io("cannot write", &path, e))?;
                Ok(Target { out, replace, file, temporary: Some(path) })
            }
            Err(e) => Err(Error::io("cannot create a file in", directory, e.into())),
        }
    }

    /// Checks that a file can be published as `out`.
    ///
    /// # Errors
    /// Returns an error if `out` is a file and `replace` is false.
    pub fn check(out: &Path, replace: bool) -> Result<()> {
        match fs::metadata(out) {
            Ok(meta) if meta.is_file() && !replace => Err(exists(out)),
            _ => Ok(()),
        }
    }

    /// Returns the file to write to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// Returns an error if a file with this name has been created since [`Target::create`] and must not be replaced, or
    /// if a system call fails.
    pub fn publish(mut self) -> Result<()> {
        let fail = |e: Errno| match e {
            Errno::EXIST => exists(&self.out),
            e => Error::io("cannot write", &self.out, e.into()),
        };
        self.file.sync_all().map_err(|e| Error::io("cannot write", &self.out, e))?;
        let link = |path: &Path| {
            let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW).map_err(fail)
        };
        match (&self.temporary, self.replace) {
            (None, false) => link(&self.out)?,
            (None, true) => {
                let path = temporary_name(&self.out)?;
                link(&path)?;
                let renamed = rustix::fs::rename(&path, &self.out).map_err(fail);
                self.temporary = Some(path);
                renamed?;
            }
            (Some(path), true) => rustix::fs::rename(path, &self.out).map_err(fail)?,
            (Some(path), false) => {
                match renameat_with(CWD, path, CWD, &self.out, RenameFlags::NOREPLACE) {
                    // Not every file system implements the flag. On the others, a file that was created just now is
                    // replaced.
                    Err(Errno::INVAL) => Target::check(&self.out, false)
                        .and_then(|()| rustix::fs::rename(path, &self.out).map_err(fail))?,
                    renamed => renamed.map_err(fail)?,
                }
            }
        }
        self.temporary = None;
        let directory = directory_of(&self.out);
        let synced = File::open(directory).and_then(|opened| opened.sync_all());
        synced.map_err(|e| Error::io("cannot sync the directory", directory, e))
    }
}

fn exists(out: &Path) -> Error {
    Error::failed("refusing to replace an existing file")
        .at(out)
        .hint("name a new file, or replace the file with --force")
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary {
            let _ = fs::remove_file(path);
        }
    }
}

fn directory_of(out: &Path) -> &Path {
    match out.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}

fn temporary_name(out: &Path) -> Result<PathBuf> {
    let name =
        out.file_name().ok_or_else(|| Error::usage("the path of the export has no file name").at(out))?;
    Ok(out.with_file_name(format!(".{}.stencil-{}", name.to_string_lossy(), &random_hex()?[..8])))
}
