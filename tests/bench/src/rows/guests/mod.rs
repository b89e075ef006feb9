//! Rows about real guests: how long after the launch of many they answer.

mod firecracker;
mod qemu;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use stencilfs::clones::working_set::warm;
use stencilfs::error::{Error, Result};
use stencilfs::progress::Silent;
use stencilfs::store::{DEFAULT_SET, TemplateFile, WorkingSet};

use super::reads::Source;
use crate::model::Input;
use crate::run::sampling::{Counters, Measurement, Procedure, Title, drop_caches, touch};
use crate::run::site::{Mount, Site, Store, run};
use crate::run::{Context, interrupt};
use crate::statistics::percentile;

/// Numbers of guests that are resumed at once.
const COUNTS: [u64; 3] = [1, 8, LARGEST];
const LARGEST: u64 = 64;

/// Number of rounds of rows with fewer guests: their times are short and differ by a tenth between rounds.
const ROUNDS: u64 = 15;

/// A directory in memory.
const TMPFS: &str = "/dev/shm";

/// Time limit for one guest to answer.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A kind of guest that can be resumed again and again.
trait Kind: Sync {
    /// Name of the virtual machine monitor.
    fn name(&self) -> &'static str;

    /// The command line that starts it.
    fn command(&self) -> &str;

    /// Starts it on this memory, resumes the guest, asks the guest something and waits for the answer. `dir` is empty.
    fn resume(&self, memory: &Path, dir: &Path) -> Result<Running>;
}

/// A process of a guest; killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn measure(context: &Context) -> Result<()> {
    let names = |kind: &str| COUNTS.map(|count| format!("resume-{kind}-{count}"));
    for kind in ["firecracker", "qemu"] {
        let names = names(kind);
        if !context.wants(&names.each_ref().map(String::as_str)) {
            continue;
        }
        let store = Store::new(context.site, kind);
        let raw = context.site.create_dir(&format!("{kind}.raw"))?;
        match kind {
            "qemu" => rows(context, &store, &raw, &names, &qemu::Qemu::capture(context.site, &store, &raw)?)?,
            _ => rows(
                context,
                &store,
                &raw,
                &names,
                &firecracker::Firecracker::snapshot(context, &store, &raw)?,
            )?,
        }
    }
    Ok(())
}

/// Measures the rows of one kind of guest, whose template is in the store and whose files are in `raw`.
fn rows(context: &Context, store: &Store, raw: &Path, names: &[String; 3], kind: &impl Kind) -> Result<()> {
    let digest = digest_in(store)?;
    context.inputs.borrow_mut().push(input(kind.name(), &raw.join("memory"))?);
    let [kernel, passthrough, decode] = ["kernel", "passthrough", "decode"].map(|serve| store.mount(serve));
    let (kernel, passthrough, decode) = (kernel?, passthrough?, decode?);
    touch(context.site, &passthrough.memory("guest"), &["first"], None)?;
    for mount in [&kernel, &passthrough, &decode] {
        mount.wait_until_served(&digest)?;
    }
    let memory =
        tempfile::tempdir_in(TMPFS).map_err(|e| Error::io("cannot create a directory in", TMPFS, e))?;
    let (from, to) = (raw.join("memory"), memory.path().join("memory"));
    std::fs::copy(&from, &to).map_err(|e| Error::io("cannot write", &to, e))?;
    let tmpfs = Source::plain("tmpfs", to)?;
    let sources = [
        Source::served(context, &kernel, "guest")?,
        Source::served(context, &passthrough, "guest")?,
        Source::served(context, &decode, "guest")?,
        Source::plain("ext4", raw.join("memory"))?,
    ];
    let sets = record(context, store, &digest, kind, &decode)?;
    for (count, name) in COUNTS.iter().zip(names) {
        let about = format!(
            "Resume {count} guests of {} at once, each on a private mapping of the memory, until all have answered a \
             question. p95 and p50 are over the guests of a round. Guests of QEMU, which run by TCG, are paused after \
             their answer. Before the rounds of `-warmed` the working set that one guest has recorded is read, before \
             those of `ext4-warm` the whole memory. `tmpfs` is a copy in memory.",
            kind.name()
        );
        let title = Title {
            name,
            about: &about,
            input: kind.name(),
            caches: "cold; -warmed, ext4-warm and tmpfs: warm",
        };
        let [kernel, passthrough, _, ext4] = &sources;
        let cold = sources.iter().map(|source| (source.name, source, Preparation::Nothing));
        let warm = [
            ("kernel-warmed", kernel, Preparation::Warm(&sets)),
            ("passthrough-warmed", passthrough, Preparation::Warm(&sets)),
            ("ext4-warm", ext4, Preparation::ReadAll),
            ("tmpfs", &tmpfs, Preparation::Nothing),
        ];
        let resumed = |(name, source, before)| resumed(context, kind, (name, source), *count, before);
        let subjects = cold.chain(warm).map(resumed).collect();
        context.row_in_rounds(title, subjects, (*count < LARGEST).then_some(ROUNDS))?;
    }
    Ok(())
}

/// The memory to read after the caches were dropped, before the guests are resumed.
#[derive(Clone, Copy)]
enum Preparation<'a> {
    Nothing,
    /// The working set.
    Warm(&'a (Vec<TemplateFile>, WorkingSet)),
    /// The whole file.
    ReadAll,
}

impl Preparation<'_> {
    fn read(self, memory: &Path) -> Result<()> {
        match self {
            Preparation::Nothing => Ok(()),
            Preparation::Warm((files, set)) => {
                let dir = memory.parent().unwrap_or(memory);
                warm(dir, files, set, &AtomicBool::new(false), &Silent).map(drop)
            }
            Preparation::ReadAll => {
                let mut file = File::open(memory).map_err(|e| Error::io("cannot read", memory, e))?;
                let copied = io::copy(&mut file, &mut io::sink());
                copied.map(drop).map_err(|e| Error::io("cannot read", memory, e))
            }
        }
    }
}

/// Resumes a guest once and records which pages its process uses.
fn record(
    context: &Context,
    store: &Store,
    digest: &str,
    kind: &impl Kind,
    decode: &Mount,
) -> Result<(Vec<TemplateFile>, WorkingSet)> {
    let dir = context.site.create_dir("recorded")?;
    decode.restart()?;
    drop_caches(context.site, context.dense_bytes)?;
    let guest = kind.resume(&decode.memory("guest"), &dir)?;
    let pid = guest.0.id().to_string();
    run(context.site.stencil(&["--store"]).arg(&store.dir).args(["working-set", "record", &pid]))?;
    drop(guest);
    std::fs::remove_dir_all(&dir).map_err(|e| Error::io("cannot remove", &dir, e))?;
    let (opened, digest) = (stencilfs::store::Store::open(&store.dir)?, digest.parse()?);
    let set = opened.working_set(&digest, DEFAULT_SET)?;
    let set = set.ok_or_else(|| Error::failed("the template has no working set").at(&store.dir))?;
    Ok((opened.template(&digest)?.files().to_vec(), set))
}

fn resumed<'a>(
    context: &'a Context,
    kind: &'a impl Kind,
    (name, source): (&'a str, &'a Source),
    count: u64,
    before: Preparation<'a>,
) -> Procedure<'a> {
    let site = context.site;
    // The directory in memory has a random name.
    let file =
        if source.file.starts_with(TMPFS) { Path::new(TMPFS).join("memory") } else { source.file.clone() };
    let command = kind.command().replace("{memory}", &file.to_string_lossy());
    Procedure {
        name,
        command: site.shown(&command),
        read_ahead_bytes: source.read_ahead_bytes,
        take: Box::new(move |_| {
            if let Some(mount) = source.mount.filter(|mount| mount.serve == "decode") {
                mount.restart()?;
            }
            let reads = source.mount.map(Mount::reads).transpose()?;
            let dirs: Vec<PathBuf> =
                (0..count).map(|index| site.create_dir(&format!("vm{index}"))).collect::<Result<_>>()?;
            drop_caches(site, 3 * context.dense_bytes)?;
            before.read(&source.file)?;
            let before = Counters::now(site)?;
            let result = resume_all(kind, &source.file, &dirs);
            for dir in &dirs {
                std::fs::remove_dir_all(dir).map_err(|e| Error::io("cannot remove", dir, e))?;
            }
            let seconds = result?;
            let at = |share| percentile(&seconds, share).unwrap_or(f64::NAN);
            let mut measurement = before.add_to(Measurement::seconds(at(1.0)), site)?;
            if let (Some(mount), Some(reads)) = (source.mount, reads) {
                measurement = measurement.count("reads", mount.reads()?.saturating_sub(reads));
            }
            Ok(measurement.with("p50_seconds", at(0.5)).with("p95_seconds", at(0.95)))
        }),
    }
}

/// Resumes a guest in each directory, all at once, and kills them when all have answered. Returns the seconds until the
/// answer of each.
fn resume_all(kind: &impl Kind, memory: &Path, dirs: &[PathBuf]) -> Result<Vec<f64>> {
    let began = Instant::now();
    let resume = |dir: &PathBuf| {
        let guest = kind.resume(memory, dir)?;
        Ok((began.elapsed().as_secs_f64(), guest))
    };
    let results: Vec<Result<(f64, Running)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = dirs.iter().map(|dir| scope.spawn(move || resume(dir))).collect();
        let panicked = |_| Err(Error::failed("a thread panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    let all: Vec<(f64, Running)> = results.into_iter().collect::<Result<_>>()?;
    Ok(all.iter().map(|(seconds, _)| *seconds).collect())
}

/// Polls until there is a value.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        interrupt::check()?;
        if Instant::now() > end {
            return Err(Error::try_again(format!("timed out waiting for {what}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The digest of the only template in a store.
fn digest_in(store: &Store) -> Result<String> {
    let found = store.site.json(&["--store", &store.dir.to_string_lossy(), "inspect", "bench:guest"])?;
    let digest = found["digest"].as_str();
    Ok(digest.ok_or_else(|| Error::failed("the template has no digest").at(&store.dir))?.to_owned())
}

fn input(name: &str, memory: &Path) -> Result<Input> {
    let failed = |e| Error::io("cannot read the memory of the guest", memory, e);
    let mut hasher = blake3::Hasher::new();
    let mut file = std::fs::File::open(memory).map_err(failed)?;
    let bytes = std::io::copy(&mut file, &mut hasher).map_err(failed)?;
    let (name, about) = (name.to_owned(), format!("memory of a running guest of {name}"));
    Ok(Input { name, about, bytes, digest: hasher.finalize().to_hex().to_string() })
}

/// Writes the files of the template `bench:guest` into a directory, the memory without holes.
fn export(site: &Site, store: &Store, raw: &Path) -> Result<()> {
    run(site.stencil(&["--store"]).arg(&store.dir).args(["export", "bench:guest"]).arg(raw)).map(drop)
}
