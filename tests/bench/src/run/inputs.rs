//! The data that is measured, made from the machine's own files.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use stencilfs::error::{Error, Result};
use stencilfs::units::to_usize;

use super::interrupt;
use super::site::{Site, Store, run};
use crate::model::Input;

const MIB: u64 = 1 << 20;

/// Length of a run of data or zeros in the image with zeros.
const RUN: u64 = 256 << 10;

/// Writes programs and libraries of this machine one after the other, in the order of their paths, up to `bytes`.
pub fn dense(site: &Site, bytes: u64) -> Result<(PathBuf, Input)> {
    let path = site.path("dense");
    let mut find = Command::new("find");
    find.args(["/usr/lib", "/usr/bin", "-xdev", "-type", "f", "-size", "+64k", "-size", "-64M"]);
    let list = run(&mut find)?;
    let mut files: Vec<&str> = list.lines().collect();
    files.sort_unstable();
    let failed = |e: io::Error| Error::io("cannot write the dense image", &path, e);
    let mut out = Hashed::create(&path).map_err(failed)?;
    for file in files {
        let mut file =
            File::open(file).map_err(|e| Error::io("cannot read", file, e))?.take(bytes - out.written);
        io::copy(&mut file, &mut out).map_err(failed)?;
        interrupt::check()?;
    }
    if out.written < bytes {
        let text =
            format!("programs and libraries of this machine have only {} of {bytes} bytes", out.written);
        return Err(Error::failed(text));
    }
    let about = "programs and libraries of the machine, one after the other";
    Ok((path.clone(), out.finish("dense", about).map_err(failed)?))
}

/// Writes an image of which 60 % are zeros: runs of 256 KiB of the dense image or of zeros, in random order. The file has
/// no holes.
pub fn with_zeros(site: &Site, dense: &Path, bytes: u64) -> Result<(PathBuf, Input)> {
    let path = site.path("zeros");
    let failed = |e: io::Error| Error::io("cannot write the image with zeros", &path, e);
    let mut source = BufReader::new(File::open(dense).map_err(failed)?);
    let mut out = Hashed::create(&path).map_err(failed)?;
    let (mut data, zeros) = (vec![0; to_usize(RUN)], vec![0; to_usize(RUN)]);
    let mut passes = 0;
    for index in 0..bytes / RUN {
        if scattered(index) % 5 >= 2 {
            out.write_all(&zeros).map_err(failed)?;
            continue;
        }
        if source.read_exact(&mut data).is_err() {
            // From another page on: the store would find the same blocks again.
            passes += 1;
            source.seek(SeekFrom::Start(passes * 4096)).map_err(failed)?;
            source.read_exact(&mut data).map_err(failed)?;
        }
        out.write_all(&data).map_err(failed)?;
        interrupt::check()?;
    }
    let about = "60 % zeros, in runs of 256 KiB among runs of the dense image";
    Ok((path.clone(), out.finish("zeros", about).map_err(failed)?))
}

/// Imports a file several times in a row as one template, without a file of that size. Returns the digest.
pub fn import_repeated(store: &Store, source: &Path, times: u64, tag: &str) -> Result<String> {
    let mut command = store.import(Path::new("-"), tag, &["--json"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| Error::io("cannot run", command.get_program(), e))?;
    let pipe = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut pipe = pipe?;
            for _ in 0..times {
                // The import has failed if it does not read: its own error says why.
                io::copy(&mut File::open(source).ok()?, &mut pipe).ok()?;
            }
            Some(())
        });
        interrupt::wait(child)
    })?;
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    digest_of(&found)
}

/// Imports a file as `bench:TAG` and returns the digest.
pub fn import(store: &Store, source: &Path, tag: &str) -> Result<String> {
    let mut command = store.import(source, tag, &["--json"]);
    digest_of(&super::site::json_of(&mut command)?)
}

fn digest_of(report: &Value) -> Result<String> {
    let digest = report["digest"].as_str();
    Ok(digest.ok_or_else(|| Error::failed(format!("the import printed no digest: {report}")))?.to_owned())
}

/// Copies an image and changes about `percent` of its pages, in runs of `pages` pages at random places. Writes the
/// changed pages alone into another file. The same `seed` gives the same changes.
pub fn changed(
    source: &Path,
    copy: &Path,
    alone: &Path,
    (percent, pages, seed): (u64, u64, u64),
) -> Result<()> {
    let failed = |e: io::Error| Error::io("cannot write a changed image", copy, e);
    let change = || -> io::Result<()> {
        let (mut from, mut to) = (BufReader::new(File::open(source)?), BufWriter::new(File::create(copy)?));
        let mut alone = BufWriter::new(File::options().append(true).create(true).open(alone)?);
        let length = pages * 4096;
        let runs = from.get_ref().metadata()?.len() / length - 1;
        let mut data = vec![0; to_usize(length)];
        // Runs of more than a page do not begin where blocks of the store do.
        io::copy(&mut from.by_ref().take(pages.min(5) / 2 * 4096), &mut to)?;
        for index in 0..runs {
            from.read_exact(&mut data)?;
            let number = scattered(seed << 32 | index);
            if number % 100 < percent {
                // Each byte is replaced by another one: the data compresses like the rest.
                let key = number.to_be_bytes()[0] | 1;
                data.iter_mut().for_each(|byte| *byte ^= key);
                alone.write_all(&data)?;
            }
            to.write_all(&data)?;
        }
        io::copy(&mut from, &mut to)?;
        to.flush()?;
        alone.flush()
    };
    change().map_err(failed)
}

/// A number that looks random: splitmix64.
pub fn scattered(index: u64) -> u64 {
    let mut x = index.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A new file whose bytes are hashed while they are written.
struct Hashed {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    written: u64,
}

impl Hashed {
    fn create(path: &Path) -> io::Result<Hashed> {
        let file = BufWriter::with_capacity(to_usize(MIB), File::create(path)?);
        Ok(Hashed { file, hasher: blake3::Hasher::new(), written: 0 })
    }

    fn finish(mut self, name: &str, about: &str) -> io::Result<Input> {
        self.file.flush()?;
        Ok(Input {
            name: name.to_owned(),
            about: about.to_owned(),
            bytes: self.written,
            digest: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_changed_image_differs_in_the_wanted_share_of_pages() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let data: Vec<u8> = (0..4096u64 * 2000).map(|i| scattered(i / 64).to_le_bytes()[0]).collect();
        fs::write(path("source"), &data).unwrap();
        changed(&path("source"), &path("copy"), &path("alone"), (5, 4, 7)).unwrap();
        let copy = fs::read(path("copy")).unwrap();
        assert_eq!(copy.len(), data.len());
        let differing: Vec<usize> =
            (0..2000).filter(|page| copy[page * 4096..][..4096] != data[page * 4096..][..4096]).collect();
        assert!((60..140).contains(&differing.len()), "{}", differing.len());
        assert_eq!(fs::metadata(path("alone")).unwrap().len(), differing.len() as u64 * 4096);
        // Runs of four pages, which begin two pages behind a multiple of four.
        let run = |page: &usize| (page - 2) / 4;
        let length = |of: usize| differing.iter().filter(|page| run(page) == of).count();
        assert!(differing.iter().all(|page| length(run(page)) == 4), "{differing:?}");
        changed(&path("source"), &path("again"), &path("alone"), (5, 4, 7)).unwrap();
        assert_eq!(fs::read(path("again")).unwrap(), copy);
        changed(&path("source"), &path("again"), &path("alone"), (5, 4, 8)).unwrap();
        assert_ne!(fs::read(path("again")).unwrap(), copy);
    }
}
