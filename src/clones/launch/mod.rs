//! Launches clones of one template: many in parallel, all or none, returning when every clone is ready.

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
use crate::sys::process::threads;
use crate::units::Bytes;
pub use child::Ready;
pub use simulate::{Amount, Scatter, Simulate};
pub use target::Target;
pub use watchdog::this_program;

/// The kind of the clones to launch.
#[derive(Debug, Clone)]
pub enum How {
    /// Simulated clones: processes of this program that touch pages like a guest.
    Simulated(Simulate),
    /// QEMU processes, resumed by this recipe.
    Qemu(Recipe),
    /// Processes of a command with placeholders.
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

/// The parameters of a launch.
#[derive(Debug)]
pub struct Order<'a> {
    /// The template.
    pub target: &'a Target,
    /// The kind of the clones.
    pub how: How,
    /// Number of clones.
    pub count: u32,
    /// Maximum number of clones that start at the same time.
    pub parallel: u32,
    /// Keeps the clones that become ready if others fail.
    pub keep_going: bool,
    /// Timeout for one clone to become ready.
    pub patience: Duration,
    /// Absolute path of the directory for the clones' disks; `None` for each clone's own directory.
    pub disk_dir: Option<PathBuf>,
    /// Cancels the launch when set.
    pub cancel: &'a AtomicBool,
}

/// A clone that did not become ready.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Failure {
    /// Index of the clone within the launch.
    pub index: u32,
    /// The reason.
    pub message: String,
}

/// The result of a launch.
#[derive(Debug)]
pub struct Launched {
    /// The ready clones, sorted by index.
    pub clones: Vec<Entry>,
    /// The failed clones; empty without `keep_going`.
    pub failures: Vec<Failure>,
    /// Outcomes of setting the clocks of QEMU clones, in no particular order.
    pub clocks: Vec<Clock>,
    /// The clones that are children of this process, for a caller that waits for them.
    pub children: Vec<std::process::Child>,
}

/// Launches clones and returns when all are ready and independent of this process.
///
/// # Errors
/// Returns an error if a clone does not become ready (with `keep_going`: if none does) or the launch is cancelled. All
/// clones of the launch are then removed.
pub fn launch(order: &Order<'_>, progress: &dyn Progress) -> Result<Launched> {
    // A failure does not matter here: leftovers of other launches never share an id or a port with this launch.
    registry::sweep().unwrap_or_else(|error| log::warn!("{error}"));
    let mut launch = Launch::prepare()?;
    // Started before any clone: if this process dies, the watchdog or the next sweep removes the clones.
    let watchdog = watchdog::start(&launch)?;
    launch.set_watchdog(watchdog.process()?);
    launch.begin()?;
    launch.set_baseline(baseline_if_idle().unwrap_or_else(|error| {
        log::warn!("no baseline of available memory for `stencil density --audit`: {error}");
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
        // Returns the first error, the cause; an error of the cleanup goes to the log.
        Err(error) => {
            launch.abort().unwrap_or_else(|error| log::error!("{error}"));
            Err(error)
        }
    }
}

/// Returns the host's available memory, unless clones exist that already use some of it.
fn baseline_if_idle() -> Result<Option<Baseline>> {
    let clones = find::template_mappings(&control::mounts()?)?.complete()?;
    if clones.is_empty() { Baseline::now().map(Some) } else { Ok(None) }
}

fn gather(order: &Order<'_>, launch: &Launch, progress: &dyn Progress) -> Result<Outcome> {
    let active = ActiveLaunch { order, launch, progress, next: AtomicU32::new(0), state: Mutex::default() };
    let outcome = match &order.how {
        How::Simulated(simulate) => herd::launch(&active, simulate)?,
        How::Qemu(recipe) => active.launch_children(|active, entry| qemu::resume(active, recipe, entry))?,
        How::Command(argv, ready) => {
            active.launch_children(|active, entry| child::run(active, argv, *ready, entry))?
        }
    };
    active.all_or_none(outcome)
}

type Outcome = (Launched, Option<herd::Held>);

/// A launch in progress.
struct ActiveLaunch<'a> {
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

impl ActiveLaunch<'_> {
    /// Returns true if no further clone is to be started and starting clones are to be abandoned.
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
    fn launch_children<F>(&self, start: F) -> Result<Outcome>
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
                self.launch_child(index, &start);
            }
            Ok(())
        })?;
        let gathered = self.gathered(std::mem::take);
        let Gathered { ready, failures, clocks, children } = gathered;
        Ok((Launched { clones: ready, failures, clocks, children }, None))
    }

    fn launch_child<F>(&self, index: u32, start: &F)
    where
        F: Fn(&Self, &mut Entry) -> Result<std::process::Child>,
    {
        let mut entry = match self.create(index, None) {
            Ok(entry) => entry,
            Err(error) => return self.failed(index, error.to_string()),
        };
        match start(self, &mut entry) {
            Ok(child) => {
                self.progress.advance(Bytes::new(1));
                self.gathered(|g| {
                    g.ready.push(entry);
                    g.children.push(child);
                });
            }
            Err(error) => {
                let log_tail = log_tail(&entry);
                // Leftovers are removed with the whole launch or by the next sweep.
                if let Err(left) = entry.destroy() {
                    log::warn!("{left}");
                }
                self.failed(index, format!("{error}{log_tail}"));
            }
        }
    }

    /// Applies the all-or-none rule: returns an error unless the clones may stay.
    fn all_or_none(&self, (mut launched, held): Outcome) -> Result<Outcome> {
        if self.order.cancel.load(Ordering::Relaxed) {
            return Err(Error::failed("interrupted: removed all clones of this launch"));
        }
        launched.clones.sort_by_key(|e| e.index);
        let (count, failed) = (self.order.count, launched.failures.len());
        // The first failure in time is the cause; later ones may be abandoned clones.
        let first = launched.failures.first().cloned();
        launched.failures.sort_by_key(|f| f.index);
        match first {
            Some(first) if !self.order.keep_going || launched.clones.is_empty() => {
                let others = if failed > 1 { format!(" ({failed} failed)") } else { String::new() };
                Err(Error::failed(format!(
                    "clone {} of {count} did not become ready{others}: {}",
                    first.index, first.message
                ))
                .remedy("all clones of this launch were removed; to keep the ready ones, use --keep-going"))
            }
            _ => Ok((launched, held)),
        }
    }
}

/// Returns the last lines of a clone's log, as a suffix of an error message.
fn log_tail(entry: &Entry) -> String {
    let Ok(Some(bytes)) = entry.read_file(LOG) else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" | ");
    let last: String = last.chars().take(400).collect();
    if last.is_empty() { last } else { format!("; the log of the clone ends with: {last}") }
}

/// Runs this process as a helper of a launch or capture, if its first argument is that of a helper.
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
