//! Progress bars with throughput and remaining time, for a terminal.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

use crate::progress::Progress;
use crate::units::Bytes;

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

    fn start_count(&self, phase: &str, total: u64) {
        self.show(ProgressBar::new(total), "{msg:12} {bar:30} {pos}/{len} {per_sec} ETA {eta}", phase);
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
