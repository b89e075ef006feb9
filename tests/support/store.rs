//! A store in a temporary directory, and the `stencil` command on it.

use crate::support::host;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use stencilfs::progress::Silent;
use stencilfs::store::{
    BLOCK_SIZE, Digest, FileKind, ImportFile, ImportRequest, Imported, Scratch, Source, Store,
};

/// FNV-1a over 64-bit words, as the C programs of the scenarios compute it for a memory image.
pub fn word_sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    words.fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x100_0000_01b3))
}

/// Returns incompressible bytes, the same for the same seed.
pub fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Returns bytes like those of a guest's memory: zero pages, text, tables of small numbers, random pages.
pub fn guest_like(seed: u64, length: usize) -> Vec<u8> {
    let noise = random(seed, length.div_ceil(4096));
    let mut bytes = vec![0; length];
    for (page, (out, kind)) in bytes.chunks_mut(4096).zip(noise).enumerate() {
        match kind % 8 {
            0..4 => {}
            4 => out.copy_from_slice(&random(seed + page as u64, 4096)[..out.len()]),
            5 | 6 => {
                out.iter_mut().enumerate().for_each(|(i, b)| *b = b"struct page_entry "[(i + page) % 18])
            }
            _ => out.iter_mut().step_by(8).for_each(|b| *b = page as u8),
        }
    }
    bytes
}

/// Flips one byte of the store's only pack such that exactly one block of the template's first file is damaged, and
/// this block is one of `blocks`. Checks the blocks through the library, so no page is read through a mount.
pub fn damage_one(dir: &Path, digest: &str, blocks: Range<u64>) -> (u64, Digest) {
    let store = Store::open(dir).unwrap();
    let digest: Digest = digest.parse().unwrap();
    let packs = store.pack_files().unwrap();
    assert_eq!(packs.len(), 1);
    let pack = File::options().read(true).write(true).open(&packs[0]).unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        pack.read_exact_at(&mut byte, at).unwrap();
        pack.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        pack.sync_all().unwrap();
    };
    for at in (0..pack.metadata().unwrap().len()).step_by(97) {
        flip(at);
        let template = Store::open(dir).unwrap().template(&digest).unwrap();
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        let lost: Vec<u64> = (0..template.block_count(0))
            .filter(|&b| template.read_block(0, b, &mut Scratch::default(), &mut buffer).is_err())
            .collect();
        if let [block] = lost[..]
            && blocks.contains(&block)
        {
            return (block, template.block_id(0, block).unwrap().unwrap());
        }
        flip(at);
    }
    panic!("no byte of the pack belongs to exactly one of the blocks {blocks:?}");
}

/// A private store.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    /// Held because an import uses much memory and all cores, which would disturb a measurement of the whole host.
    _host: host::Shared,
}

/// The result of a command.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn ok(self) -> Ran {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Returns a `stencil` command for the store in `dir`.
pub fn stencil(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stencil"));
    command.args(args).env("STENCIL_STORE", dir.join("store")).env("STENCIL_RUNTIME_DIR", dir.join("run"));
    command
}

impl Fixture {
    pub fn new() -> Fixture {
        Fixture { dir: tempfile::tempdir().unwrap(), _host: host::shared() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a new file with these bytes and returns its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    pub fn store(&self) -> Store {
        Store::open_or_create(&self.path("store")).unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        stencil(self.dir.path(), args).output().unwrap().into()
    }

    /// Returns a request for a template with the one file `memory`.
    pub fn request(&self, tag: &str, bytes: &[u8]) -> ImportRequest {
        let source = self.file(&format!("{}.source", Digest::of(tag.as_bytes()).short()), bytes);
        let kind = if bytes.len().is_multiple_of(4096) && !bytes.is_empty() {
            FileKind::Ram
        } else {
            FileKind::Blob
        };
        let file = ImportFile { name: "memory".into(), kind, source: Source::Path(source) };
        ImportRequest::new(Some(tag.parse().unwrap()), vec![file])
    }

    pub fn import(&self, tag: &str, bytes: &[u8]) -> Imported {
        self.store().import(self.request(tag, bytes), &Silent).unwrap()
    }

    /// The files below a directory of the store, sorted.
    pub fn files(&self, directory: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.path("store").join(directory), &mut found);
        found.sort();
        found
    }

    /// Panics if a failed or killed command has left something: a session, or a file that is not part of the layout.
    pub fn assert_clean(&self) {
        assert_eq!(self.files("tmp"), Vec::<PathBuf>::new());
        for file in self.files("") {
            let name = file.file_name().unwrap().to_string_lossy();
            assert!(!name.starts_with('.'), "{} was left behind", file.display());
        }
    }

    /// The disk space that the store takes, in bytes (allocated blocks).
    pub fn disk_usage(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.files("").iter().map(|f| fs::metadata(f).unwrap().blocks() * 512).sum()
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}

/// Returns all bytes of one file of a template, or the error of its first damaged block.
pub fn read_all(store: &Store, digest: &Digest, file: usize) -> stencilfs::error::Result<Vec<u8>> {
    let template = store.template(digest)?;
    let (mut scratch, mut out, mut block) = (Scratch::default(), Vec::new(), vec![1; BLOCK_SIZE as usize]);
    for number in 0..template.block_count(file) {
        let length = template.read_block(file, number, &mut scratch, &mut block)?;
        out.extend_from_slice(&block[..length]);
    }
    Ok(out)
}
