//! Launches clones of one template: many at a time, all or none, held until every one is ready.

mod child;
mod herd;
mod own;
mod qemu;
mod simulate;
mod target;
mod watchdog;
mod worker;
mod zygote;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::clones::agent::Clock;
use crate::clones::baseline::Baseline;
use crate::clones::capture;
use crate::clones::find;
use crate::clones::recipe::Recipe;
use crate::clones::registry::{self, Entry, Kind, LOG, Launch, NewEntry, Touched};
use crate::control;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::threads;
use crate::units::Bytes;
pub use child::Ready;
pub use simulate::{Amount, Scatter, Simulate};
pub use target::Target;
pub use watchdog::this_program;

/// What a clone is.
#[derive(Debug, Clone)]
pub enum How {
    /// A worker of ours.
    Simulated(Simulate),
    /// A QEMU, resumed by this recipe.
    Qemu(Recipe),
    /// Any command, with placeholders.
    Command(Vec<String>, Ready),
}

impl How {
    fn kind(&self) -> Kind {
        match self {
            How::Simulated(_) => Kind::Simulated,
            How::Qemu(_) => Kind::Qemu,
            How::Command(..) => Kind::Command,
        }
    }
}

/// What is to be launched, and how.
#[derive(Debug)]
pub struct Order<'a> {
    /// The template.
    pub target: &'a Target,
    /// What a clone is.
    pub how: How,
    /// How many.
    pub count: u32,
    /// How many at a time.
    pub parallel: u32,
    /// Those that get ready stay, though others fail.
    pub keep_going: bool,
    /// How long one clone may take to get ready.
    pub patience: Duration,
    /// Where the clones' disks are to be, unless in their own folders: an absolute path.
    pub disk_dir: Option<PathBuf>,
    /// Set from outside when the launch is to be given up.
    pub cancel: &'a AtomicBool,
}

/// A clone that did not get ready.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Failure {
    /// Its number within the launch.
    pub index: u32,
    /// Why.
    pub message: String,
}

/// Clones that live on.
#[derive(Debug)]
pub struct Launched {
    /// Those that are ready, by index.
    pub clones: Vec<Entry>,
    /// Those that failed; empty without `keep_going`.
    pub failures: Vec<Failure>,
    /// What became of the clocks of those that are QEMUs, in no order.
    pub clocks: Vec<Clock>,
    /// Processes that are children of this one, for who wants to wait for them.
    pub children: Vec<std::process::Child>,
}

/// Launches clones and returns when all are ready and live on without this process.
///
/// # Errors
/// When one does not get ready (unless `keep_going` and another does), or the launch is cancelled: then
/// nothing of it is left.
pub fn launch(order: &Order<'_>, progress: &dyn Progress) -> Result<Launched> {
    // What another launch has left is in nobody's way: ids and ports are never given twice.
    registry::sweep().unwrap_or_else(|error| log::warn!("{error}"));
    let mut launch = Launch::prepare()?;
    // The watchdog comes first: whatever happens to this process from here on, it or the next sweep clears up.
    let watchdog = watchdog::start(&launch)?;
    launch.set_watchdog(watchdog.process()?);
    launch.begin()?;
    launch.set_baseline(baseline_if_idle().unwrap_or_else(|error| {
        log::warn!("`density --audit` will not compare the host's available memory: {error}");
        None
    }));
    progress.start_count("launch", order.count.into());
    let gathered = gather(order, &launch, progress);
    progress.finish();
    let outcome = gathered.and_then(|(launched, held)| {
        held.map_or(Ok(()), herd::Held::release)?;
        Ok(launched)
    });
    match outcome {
        Ok(launched) => {
            launch.commit()?;
            Ok(launched)
        }
        // The first error is what the user must see; what cannot be cleared goes into the log.
        Err(error) => {
            launch.abort().unwrap_or_else(|left| log::error!("{left}"));
            Err(error)
        }
    }
}

/// The host's free memory, if no clone lives that has taken of it already.
fn baseline_if_idle() -> Result<Option<Baseline>> {
    let clones = find::template_mappings(&control::mounts()?)?.complete()?;
    if clones.is_empty() { Baseline::now().map(Some) } else { Ok(None) }
}

fn gather(order: &Order<'_>, launch: &Launch, progress: &dyn Progress) -> Result<Outcome> {
    let herd = Herd { order, launch, progress, next: AtomicU32::new(0), state: Mutex::default() };
    let outcome = match &order.how {
        How::Simulated(simulate) => herd::launch(&herd, simulate)?,
        How::Qemu(recipe) => herd.pooled(|herd, entry| qemu::resume(herd, recipe, entry))?,
        How::Command(argv, ready) => herd.pooled(|herd, entry| child::run(herd, argv, *ready, entry))?,
    };
    herd.judge(outcome)
}

type Outcome = (Launched, Option<herd::Held>);

/// A launch under way.
struct Herd<'a> {
    order: &'a Order<'a>,
    launch: &'a Launch,
    progress: &'a dyn Progress,
    next: AtomicU32,
    state: Mutex<Gathered>,
}

#[derive(Default)]
struct Gathered {
    ready: Vec<Entry>,
    failures: Vec<Failure>,
    clocks: Vec<Clock>,
    children: Vec<std::process::Child>,
}

impl Herd<'_> {
    /// True when no further clone should be begun and those under way be given up.
    fn is_over(&self) -> bool {
        self.order.cancel.load(Ordering::Relaxed)
            || (!self.order.keep_going && !self.gathered(|g| g.failures.is_empty()))
    }

    fn gathered<T>(&self, use_it: impl FnOnce(&mut Gathered) -> T) -> T {
        use_it(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn create(&self, index: u32, touched: Option<Touched>) -> Result<Entry> {
        let digest = self.order.target.digest.to_string();
        let kind = self.order.how.kind();
        self.launch.create(&NewEntry {
            name: &self.order.target.name,
            template: &digest,
            store: &self.order.target.store,
            kind,
            index,
            touched,
            disk_dir: self.order.disk_dir.as_deref(),
        })
    }

    fn failed(&self, index: u32, message: String) {
        self.gathered(|g| g.failures.push(Failure { index, message }));
    }

    /// Launches clones that are children of this process, `parallel` at a time.
    fn pooled<F>(&self, one: F) -> Result<Outcome>
    where
        F: Fn(&Self, &mut Entry) -> Result<std::process::Child> + Sync,
    {
        let parallel = self.order.parallel.clamp(1, self.order.count.max(1));
        threads::share(parallel as usize, || {
            while !self.is_over() {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= self.order.count {
                    break;
                }
                self.one(index, &one);
            }
            Ok(())
        })?;
        let gathered = self.gathered(std::mem::take);
        let Gathered { ready, failures, clocks, children } = gathered;
        Ok((Launched { clones: ready, failures, clocks, children }, None))
    }

    fn one<F>(&self, index: u32, one: &F)
    where
        F: Fn(&Self, &mut Entry) -> Result<std::process::Child>,
    {
        let mut entry = match self.create(index, None) {
            Ok(entry) => entry,
            Err(error) => return self.failed(index, error.to_string()),
        };
        match one(self, &mut entry) {
            Ok(child) => {
                self.progress.advance(Bytes::new(1));
                self.gathered(|g| {
                    g.ready.push(entry);
                    g.children.push(child);
                });
            }
            Err(error) => {
                let said = tail(&entry);
                // What cannot be removed now is removed with the whole launch, or by the next sweep.
                if let Err(left) = entry.destroy() {
                    log::warn!("{left}");
                }
                self.failed(index, format!("{error}{said}"));
            }
        }
    }

    /// All or none: gives back what may stay.
    fn judge(&self, (mut launched, held): Outcome) -> Result<Outcome> {
        if self.order.cancel.load(Ordering::Relaxed) {
            return Err(Error::failed("interrupted: all clones of this launch were removed"));
        }
        launched.clones.sort_by_key(|e| e.index);
        let (count, bad) = (self.order.count, launched.failures.len());
        // The first in time is why others were given up.
        let first = launched.failures.first().cloned();
        launched.failures.sort_by_key(|f| f.index);
        match first {
            Some(first) if !self.order.keep_going || launched.clones.is_empty() => {
                let others = if bad > 1 { format!(" ({bad} failed)") } else { String::new() };
                Err(Error::failed(format!(
                    "clone {} of {count} did not get ready{others}: {}",
                    first.index, first.message
                ))
                .remedy("nothing of this launch is left; --keep-going keeps the clones that do get ready"))
            }
            _ => Ok((launched, held)),
        }
    }
}

/// The last lines of a log, for an error message.
fn tail(entry: &Entry) -> String {
    let Ok(Some(bytes)) = entry.read_file(LOG) else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" | ");
    let last: String = last.chars().take(400).collect();
    if last.is_empty() { last } else { format!("; its log ends with: {last}") }
}

/// Runs this process as one of the launcher's helpers, if its arguments say that it is one.
pub fn helper_main() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let first = args.next()?;
    if first == zygote::ARGUMENT {
        Some(zygote::main())
    } else if first == watchdog::ARGUMENT {
        Some(watchdog::main(args.next()))
    } else if first == capture::RESUME_ARGUMENT {
        Some(capture::resume_main(args))
    } else {
        None
    }
}
