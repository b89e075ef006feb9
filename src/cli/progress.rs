//! Progress of a command on standard error: bars with throughput and remaining time, or JSON lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::progress::Progress;
use crate::units::Bytes;

/// Shortest time between two JSON lines of a phase.
const LINE_INTERVAL: Duration = Duration::from_millis(200);

/// Form of progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// A bar, if standard error is a terminal
    Auto,
    /// JSON objects, one per line
    Json,
}

/// Creates a progress bar on standard error.
pub fn bar() -> Box<dyn Progress> {
    Box::new(Bar(Mutex::new(None)))
}

struct Bar(Mutex<Option<ProgressBar>>);

impl Bar {
    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        if let Ok(mut bar) = self.0.lock() {
            act(&mut bar);
        }
    }

    fn show(&self, bar: ProgressBar, template: &str, phase: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(phase.to_owned());
        self.with(|slot| *slot = Some(bar));
    }
}

impl Progress for Bar {
    fn start(&self, phase: &str, total: Option<Bytes>) {
        let template = match total {
            Some(_) => "{msg:12} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
            None => "{msg:12} {spinner} {bytes} {bytes_per_sec}",
        };
        let bar = match total {
            Some(total) => ProgressBar::new(total.get()),
            None => ProgressBar::new_spinner(),
        };
        self.show(bar, template, phase);
    }

    fn start_count(&self, phase: &str, unit: &'static str, total: u64) {
        let template = format!("{{msg:12}} {{bar:30}} {{pos}}/{{len}} {unit} {{per_sec}} ETA {{eta}}");
        self.show(ProgressBar::new(total), &template, phase);
    }

    fn advance(&self, done: Bytes) {
        self.with(|slot| {
            if let Some(bar) = slot {
                bar.inc(done.get());
            }
        });
    }

    fn finish(&self) {
        self.with(|slot| {
            if let Some(bar) = slot.take() {
                bar.finish_and_clear();
            }
        });
    }
}

/// Creates a receiver that writes JSON lines to standard error: at the beginning of each phase, at intervals, and at
/// its end.
pub fn json_lines() -> Box<dyn Progress> {
    Box::new(Lines(Mutex::new(None)))
}

struct Lines(Mutex<Option<Phase>>);

struct Phase {
    name: String,
    unit: &'static str,
    done: u64,
    total: Option<u64>,
    printed: Instant,
}

impl Phase {
    fn print(&mut self) {
        self.printed = Instant::now();
        // The last block of a file may be shorter than its share of the progress.
        let done = self.done.min(self.total.unwrap_or(u64::MAX));
        let line =
            json!({"schema": 1, "phase": self.name, "done": done, "total": self.total, "unit": self.unit});
        crate::print_line!("{}", line.to_string());
    }
}

impl Lines {
    fn begin(&self, name: &str, unit: &'static str, total: Option<u64>) {
        let mut phase = Phase { name: name.to_owned(), unit, done: 0, total, printed: Instant::now() };
        phase.print();
        if let Ok(mut slot) = self.0.lock() {
            *slot = Some(phase);
        }
    }
}

impl Progress for Lines {
    fn start(&self, phase: &str, total: Option<Bytes>) {
        self.begin(phase, "bytes", total.map(Bytes::get));
    }

    fn start_count(&self, phase: &str, unit: &'static str, total: u64) {
        self.begin(phase, unit, Some(total));
    }

    fn advance(&self, done: Bytes) {
        if let Ok(mut slot) = self.0.lock()
            && let Some(phase) = slot.as_mut()
        {
            phase.done += done.get();
            if phase.printed.elapsed() >= LINE_INTERVAL {
                phase.print();
            }
        }
    }

    fn finish(&self) {
        let phase = self.0.lock().ok().and_then(|mut slot| slot.take());
        if let Some(mut phase) = phase {
            phase.print();
        }
    }
}
