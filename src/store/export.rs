//! Export: the plain bytes again, sparse, whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};

use super::codec::is_zero;
use super::publish::random_hex;
use super::{BLOCK_SIZE, Scratch, Template};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::stream::Sink;
use crate::sys::threads;
use crate::units::{Bytes, PAGE_SIZE};

/// Blocks that one thread takes at a time.
const SHARE: u64 = 64;

impl Template {
    /// Writes one file of the template to the file `out`, which appears (or is replaced) complete or
    /// not at all. Zero pages become holes. All cores decode. A named pipe is waited for until it has a reader, no longer
    /// than `stall` unless that is zero.
    ///
    /// # Errors
    /// [`Code::Damage`](crate::error::Code) when a block is damaged, or what the system says about
    /// `out`; a failed export after `interrupt` became true.
    pub fn export_file(
        &self,
        file: usize,
        out: &Path,
        (interrupt, stall): (&AtomicBool, Duration),
        progress: &dyn Progress,
    ) -> Result<()> {
        // The file behind a link is replaced, not the link.
        let out = &fs::canonicalize(out).unwrap_or_else(|_| out.to_owned());
        if let Ok(meta) = fs::metadata(out)
            && !meta.is_file()
        {
            let kind = meta.file_type();
            if kind.is_fifo() || kind.is_char_device() {
                let mut stream = Sink::open(out, Some(stall), Some(interrupt))?;
                return self.export_stream(file, out, &mut stream, interrupt, progress);
            }
            return Err(Error::usage("the export cannot replace what is there")
                .at(out)
                .remedy("name a file that does not exist yet, or - for standard output"));
        }
        let target = Target::create(out, self.policy().mode | 0o200)?;
        let size = self.files().get(file).map_or(0, |f| f.size.get());
        target.file.set_len(size).map_err(|e| Error::io("cannot write", out, e))?;
        progress.start("export", Some(Bytes::new(size)));
        let written = self.write_blocks(file, &target.file, out, interrupt, progress);
        progress.finish();
        written?;
        target.publish(out)
    }

    /// Writes one file of the template to a stream, in order, zeros included. Every byte that was
    /// written was verified; after an error the stream ends early. Errors call the stream `name`.
    ///
    /// # Errors
    /// As [`Template::export_file`].
    pub fn export_stream(
        &self,
        file: usize,
        name: &Path,
        out: &mut dyn Write,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (mut scratch, mut block) = (Scratch::default(), vec![0; BLOCK_SIZE as usize]);
        progress.start("export", self.files().get(file).map(|f| f.size));
        for number in 0..self.block_count(file) {
            check(interrupt)?;
            let length = self.read_block(file, number, &mut scratch, &mut block)?;
            out.write_all(&block[..length]).map_err(|e| Error::io("cannot write the export", name, e))?;
            progress.advance(Bytes::new(length as u64));
        }
        progress.finish();
        out.flush().map_err(|e| Error::io("cannot write the export", name, e))
    }

    fn write_blocks(
        &self,
        file: usize,
        target: &File,
        out: &Path,
        interrupt: &AtomicBool,
        progress: &dyn Progress,
    ) -> Result<()> {
        let next = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let blocks = self.block_count(file);
        let work = || -> Result<()> {
            let (mut scratch, mut block) = (Scratch::default(), vec![0; BLOCK_SIZE as usize]);
            while !failed.load(Ordering::Relaxed) {
                let start = next.fetch_add(SHARE, Ordering::Relaxed);
                if start >= blocks {
                    break;
                }
                check(interrupt)?;
                for number in start..(start + SHARE).min(blocks) {
                    if self.block_id(file, number)?.is_some() {
                        let length = self.read_block(file, number, &mut scratch, &mut block)?;
                        write_pages(target, number * BLOCK_SIZE, &block[..length])
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
        true => Err(Error::failed("interrupted: nothing was exported")),
        false => Ok(()),
    }
}

/// Writes the pages that are not zero; neighbours together.
fn write_pages(file: &File, offset: u64, block: &[u8]) -> io::Result<()> {
    let mut run: Option<usize> = None;
    for (start, page) in (0..).step_by(PAGE_SIZE as usize).zip(block.chunks(PAGE_SIZE as usize)) {
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

/// A new file that appears (or replaces another) complete or not at all. It has no name until then, so that nothing is left
/// however the process ends.
#[derive(Debug)]
pub struct Target {
    file: File,
    /// Where the filesystem has no nameless files.
    temporary: Option<PathBuf>,
}

impl Target {
    /// A file that is to be `out`, with these permission bits.
    ///
    /// # Errors
    /// When its folder cannot be written.
    pub fn create(out: &Path, mode: u32) -> Result<Target> {
        let folder = folder_of(out);
        let nameless = rustix::fs::open(
            folder,
            OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::from_raw_mode(mode),
        );
        match nameless {
            Ok(file) => Ok(Target { file: file.into(), temporary: None }),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
                let path = temporary_name(out)?;
                let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
                let file = file.map_err(|e| Error::io("cannot write", &path, e))?;
                Ok(Target { file, temporary: Some(path) })
            }
            Err(e) => Err(Error::io("cannot write into", folder, e.into())),
        }
    }

    /// Where to write.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives it its name; it is on the disk then.
    ///
    /// # Errors
    /// What the system says about `out`.
    pub fn publish(mut self, out: &Path) -> Result<()> {
        let fail = |e: io::Error| Error::io("cannot write", out, e);
        self.file.sync_all().map_err(fail)?;
        let temporary = match self.temporary.take() {
            Some(path) => path,
            None => {
                let path = temporary_name(out)?;
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, own, CWD, &path, AtFlags::SYMLINK_FOLLOW).map_err(|e| fail(e.into()))?;
                path
            }
        };
        let renamed = fs::rename(&temporary, out).map_err(fail);
        if renamed.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        let folder = folder_of(out);
        renamed.and_then(|()| {
            let synced = File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|e| Error::io("cannot sync the folder", folder, e))
        })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary {
            let _ = fs::remove_file(path);
        }
    }
}

fn folder_of(out: &Path) -> &Path {
    match out.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn temporary_name(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| Error::usage("the export needs a file name").at(out))?;
    Ok(out.with_file_name(format!(".{}.stencil-{}", name.to_string_lossy(), &random_hex()?[..8])))
}
