//! A launch in progress, which several threads share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use super::order::{Failure, LaunchRequest, Launched};
use crate::clones::agent::Clock;
use crate::clones::registry::{Entry, LOG, Launch, NewEntry, SharedRecord, Touched, VMM_LOG};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::process::session::Child;
use crate::sys::process::threads;
use crate::units::Bytes;

/// A launch in progress.
pub(super) struct ActiveLaunch<'a> {
    pub order: &'a LaunchRequest<'a>,
    pub launch: &'a Launch,
    pub progress: &'a dyn Progress,
    pub next: AtomicU32,
    pub state: Mutex<Gathered>,
}

#[derive(Default)]
pub(super) struct Gathered {
    pub ready: Vec<Entry>,
    pub failures: Vec<Failure>,
    pub clocks: Vec<Clock>,
    pub children: Vec<Child>,
}

impl ActiveLaunch<'_> {
    /// Returns true if no further clone is to be started and starting clones are to be abandoned.
    pub fn is_over(&self) -> bool {
        self.order.cancel.load(Ordering::Relaxed)
            || (!self.order.keep_going && !self.gathered(|g| g.failures.is_empty()))
    }

    pub fn gathered<T>(&self, use_it: impl FnOnce(&mut Gathered) -> T) -> T {
        use_it(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Creates the record of the simulated clones, without any clone.
    pub fn create_shared(&self, touched: Touched, [mapped, done]: [String; 2]) -> Result<SharedRecord> {
        let digest = self.order.target.digest.to_string();
        self.launch.create_shared(
            &NewEntry { touched: Some(touched), ..self.new_entry(&digest) },
            mapped,
            done,
        )
    }

    fn new_entry<'b>(&'b self, digest: &'b str) -> NewEntry<'b> {
        NewEntry {
            name: &self.order.target.name,
            template: digest,
            store: &self.order.target.store,
            kind: self.order.how.kind(),
            touched: None,
            labels: &self.order.labels,
            disk_dir: self.order.disk_dir.as_deref(),
        }
    }

    pub fn failed(&self, index: u32, message: String, hint: Option<&str>) {
        let hint = hint.map(str::to_owned);
        self.gathered(|g| g.failures.push(Failure { index, message, hint }));
    }

    /// Launches clones that are children of this process, `parallel` at a time.
    pub fn launch_children<F>(&self, start: F) -> Result<Launched>
    where
        F: Fn(&Self, &mut Entry) -> Result<Child> + Sync,
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
        Ok(Launched { clones: ready, failures, clocks, children })
    }

    /// Removes a clone that did not become ready.
    pub fn give_up(&self, entry: &Entry, error: &Error) {
        let log_tail = log_tail(entry);
        // Leftovers are removed with the whole launch or by the next sweep.
        if let Err(left) = entry.destroy() {
            log::warn!("{left}");
        }
        self.failed(entry.index, format!("{error}{log_tail}"), error.hint_text());
    }

    fn launch_child<F>(&self, index: u32, start: &F)
    where
        F: Fn(&Self, &mut Entry) -> Result<Child>,
    {
        let digest = self.order.target.digest.to_string();
        let mut entry = match self.launch.create(&self.new_entry(&digest), index) {
            Ok(entry) => entry,
            Err(error) => return self.failed(index, error.to_string(), error.hint_text()),
        };
        match start(self, &mut entry) {
            Ok(child) => {
                self.progress.advance(Bytes::new(1));
                self.gathered(|g| {
                    g.ready.push(entry);
                    g.children.push(child);
                });
            }
            Err(error) => self.give_up(&entry, &error),
        }
    }

    /// Applies the all-or-none rule: returns an error unless the clones may stay.
    pub fn all_or_none(&self, mut launched: Launched) -> Result<Launched> {
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
                let hint = first.hint.map_or(String::new(), |hint| format!("{hint}; or "));
                Err(Error::failed(format!(
                    "clone {} of {count} did not become ready{others}: {}",
                    first.index, first.message
                ))
                .hint(format!(
                    "{hint}use --keep-going to keep the clones that become ready; all clones of this launch were removed"
                )))
            }
            _ => Ok(launched),
        }
    }
}

/// Returns the last lines of a clone's logs, as a suffix of an error message.
fn log_tail(entry: &Entry) -> String {
    let logs = [VMM_LOG, LOG].map(|name| entry.read_file(name).ok().flatten().unwrap_or_default());
    let bytes = logs.concat();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" | ");
    let last: String = last.chars().take(400).collect();
    if last.is_empty() { last } else { format!("; the log of the clone ends with: {last}") }
}
