//! Drives `reader.c`: processes that read pages which are not in the page cache, and exit at the first error or wrong
//! byte.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::support::actor;
use crate::support::store::word_sum;
use crate::support::vm::guest::patiently;

pub const PAGE: u64 = 4096;

/// A memory image of which readers can compute every byte.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// Images with different salts differ in every page.
    pub salt: u64,
    /// The length in pages.
    pub pages: u64,
}

fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Image {
    /// The bytes of one page, as `reader.c` computes them.
    pub fn page(&self, page: u64) -> [u8; PAGE as usize] {
        let mut bytes = [0; PAGE as usize];
        for (word, out) in bytes.chunks_exact_mut(8).enumerate() {
            let word = word as u64;
            let value = if word.is_multiple_of(2) {
                splitmix((page * 512 + word).wrapping_add(self.salt))
            } else {
                page
            };
            out.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The result of the `hash` command of `actor.c` for this page.
    pub fn hash(&self, page: u64) -> u64 {
        word_sum(&self.page(page)) >> 1
    }

    /// The bytes of the whole image.
    pub fn bytes(&self) -> Vec<u8> {
        (0..self.pages).flat_map(|page| self.page(page)).collect()
    }
}

/// A slow read, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Copy)]
pub struct Stall {
    pub begin: u64,
    pub end: u64,
}

/// The report of a reader that ended without an error.
#[derive(Debug)]
pub struct Finished {
    pub pages: u64,
    pub stalls: Vec<Stall>,
}

/// Readers of one image; killed on drop.
pub struct Readers {
    progress: File,
    pause: Duration,
    all: Vec<(String, Child)>,
}

impl Readers {
    /// Starts with no readers; `dir` gets the file of their progress. Each reader sleeps for `pause` after each read.
    pub fn new(dir: &Path, pause: Duration) -> Readers {
        let progress = dir.join("progress");
        let _ = std::fs::remove_file(&progress);
        let progress =
            File::create_new(&progress).and_then(|_| File::options().read(true).write(true).open(progress));
        let progress = progress.unwrap();
        progress.set_len(PAGE).unwrap();
        Readers { progress, pause, all: Vec::new() }
    }

    /// Starts a reader of `count` pages from page `first` of the image in `path`; `way` is one of the ways of
    /// `reader.c`.
    pub fn add(&mut self, way: &str, image: Image, path: &Path, first: u64, count: u64) {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let pause = self.pause.as_micros() as u64;
        let numbers = [self.all.len() as u64, pause, image.salt, first, count].map(|n| n.to_string());
        let child = Command::new(PROGRAM.get_or_init(|| actor::compile("reader")))
            .arg(format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                rustix::fd::AsRawFd::as_raw_fd(&self.progress)
            ))
            .args([&numbers[0], &numbers[1], way, &numbers[2]])
            .arg(path)
            .args(&numbers[3..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        self.all.push((way.to_owned(), child));
    }

    /// Starts one reader for each way, each with an equal part of the image.
    pub fn apart(&mut self, ways: &[&str], image: Image, path: &Path) {
        let count = image.pages / ways.len() as u64;
        for (i, way) in ways.iter().enumerate() {
            self.add(way, image, path, i as u64 * count, count);
        }
    }

    /// The number of pages that each reader has read.
    pub fn progress(&self) -> Vec<u64> {
        let mut bytes = vec![0; self.all.len() * 8];
        self.progress.read_exact_at(&mut bytes, 0).unwrap();
        bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
    }

    /// The PID of a reader.
    pub fn pid(&self, index: usize) -> u32 {
        self.all[index].1.id()
    }

    /// Kills a reader with SIGKILL and returns the time until it was reaped.
    pub fn kill(&mut self, index: usize) -> Duration {
        let begun = Instant::now();
        let (_, child) = &mut self.all[index];
        child.kill().unwrap();
        child.wait().unwrap();
        begun.elapsed()
    }

    /// Panics with the output of a reader that has exited early.
    #[track_caller]
    pub fn check(&mut self) {
        for (way, child) in &mut self.all {
            if let Some(status) = child.try_wait().unwrap() {
                let mut said = String::new();
                child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
                panic!("the reader by {way} exited: {status}, output: {}", said.trim());
            }
        }
    }

    /// Waits until each reader has read `more` more pages; panics when one exits or makes no progress for about 20 s.
    #[track_caller]
    pub fn wait_progress(&mut self, more: u64) {
        let before = self.progress();
        let ready = |now: &[u64]| now.iter().zip(&before).all(|(now, before)| *now >= before + more);
        for _ in 0..40_000 {
            if ready(&self.progress()) {
                return;
            }
            self.check();
            std::thread::sleep(Duration::from_micros(500));
        }
        panic!("a reader makes no progress: {before:?}, then {:?}", self.progress());
    }

    /// Ends all readers; panics unless each read without an error.
    #[track_caller]
    pub fn finish(mut self) -> Vec<Finished> {
        self.all.iter_mut().for_each(|(_, child)| drop(child.stdin.take()));
        let mut finished = Vec::new();
        for (way, mut child) in std::mem::take(&mut self.all) {
            let out = child.stdout.take().unwrap();
            let said = std::thread::spawn(move || BufReader::new(out).lines().map(Result::unwrap).collect());
            let status =
                patiently(&format!("the exit of the reader by {way}"), Duration::from_secs(30), || {
                    child.try_wait().unwrap()
                });
            let said: Vec<String> = said.join().unwrap();
            let last = said.last().map_or("nothing", String::as_str);
            assert!(
                status.success(),
                "the reader by {way}: exit {:?}, signal {:?}, output: {last}",
                status.code(),
                status.signal()
            );
            let pages = last.strip_prefix("read ").unwrap().parse().unwrap();
            let stalls = said.iter().filter_map(|line| {
                let mut numbers = line.strip_prefix("stall ")?.split(' ').map(|n| n.parse().unwrap());
                Some(Stall { begin: numbers.next()?, end: numbers.next()? })
            });
            finished.push(Finished { pages, stalls: stalls.collect() });
        }
        finished
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // A reader that is blocked in a read exits when the mount is gone.
        for (_, child) in &mut self.all {
            let _ = child.kill();
        }
    }
}
