//! The figures of a sample, with rates since the sample before.

use std::collections::HashMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use serde_json::json;

use crate::clones::accounting::sampler::{BlockedProcess, Layout, Sample, SampledTemplates};
use crate::clones::accounting::{CloneRow, TemplateMemory, Totals};
use crate::store::Digest;
use crate::sys::process::ProcessId;
use crate::units::approximate;

/// One clone.
#[derive(Debug, Clone, Serialize)]
pub struct CloneFigures {
    #[serde(flatten)]
    pub row: CloneRow,
    /// Growth of `dirty_pages`; negative if the clone has given pages back. `None` in the first sample of a process.
    pub copied_pages_per_second: Option<f64>,
    /// True if a thread has been in one uninterruptible sleep since the sample before.
    pub blocked: bool,
    #[serde(skip)]
    pub process: ProcessId,
    #[serde(skip)]
    pub layout: Option<Layout>,
}

/// All figures of a sample.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Time of the sample, in seconds since 1970.
    pub time: u64,
    /// Time since the sample before.
    pub interval_seconds: Option<f64>,
    pub templates: Vec<TemplateMemory>,
    pub clones: Vec<CloneFigures>,
    /// `None` until the templates could be measured once.
    pub totals: Option<Totals>,
    /// Sum over the clones of both samples.
    pub copied_pages_per_second: Option<f64>,
    /// Age of the figures of the templates.
    pub templates_age_seconds: Option<f64>,
    /// Processes that could not be inspected, and may be clones.
    #[serde(rename = "unseen", serialize_with = "unseen")]
    pub blocked: Vec<BlockedProcess>,
    /// Labels of the templates.
    #[serde(skip)]
    pub labels: HashMap<Digest, Vec<String>>,
    /// Why the figures of the templates are old.
    pub problem: Option<String>,
}

fn unseen<S: Serializer>(processes: &[BlockedProcess], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(processes.iter().map(|blocked| {
        let id = blocked.clone.as_ref().map(|(id, _)| id);
        json!({"pid": blocked.process.pid, "id": id, "command": blocked.command})
    }))
}

/// The copied pages of each process in the last sample.
#[derive(Debug, Default)]
pub struct Rates(Option<(Instant, HashMap<ProcessId, u64>)>);

impl Rates {
    /// Adds a sample. Returns its figures.
    pub fn add(&mut self, sample: Sample) -> Figures {
        let now: Vec<(ProcessId, u64)> =
            sample.clones.iter().map(|clone| (clone.process, clone.row.memory.dirty_pages.get())).collect();
        let interval_seconds = self.0.as_ref().map(|(at, _)| (sample.at - *at).as_secs_f64());
        let rates = self.rates(&now, interval_seconds);
        self.0 = Some((sample.at, now.into_iter().collect()));
        let copied_pages_per_second = interval_seconds.map(|_| rates.iter().flatten().sum());
        let clones = sample.clones.into_iter().zip(rates);
        let clones = clones.map(|(clone, copied_pages_per_second)| CloneFigures {
            row: clone.row,
            copied_pages_per_second,
            blocked: clone.blocked,
            process: clone.process,
            layout: clone.layout,
        });
        let mut figures = Figures {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            interval_seconds,
            templates: Vec::new(),
            clones: clones.collect(),
            totals: None,
            copied_pages_per_second,
            templates_age_seconds: None,
            blocked: sample.blocked,
            labels: HashMap::new(),
            problem: sample.problem,
        };
        if let Some(SampledTemplates { templates, totals, labels, age }) = sample.templates {
            (figures.templates, figures.totals) = (templates, Some(totals));
            (figures.labels, figures.templates_age_seconds) =
                (labels.into_iter().collect(), Some(age.as_secs_f64()));
        }
        figures
    }

    /// Returns the rate of each process. The identity tells a process from an earlier one with the same process id.
    fn rates(&self, now: &[(ProcessId, u64)], seconds: Option<f64>) -> Vec<Option<f64>> {
        let rate = |(process, pages): &(ProcessId, u64)| {
            let before = self.0.as_ref()?.1.get(process)?;
            let change = approximate(pages.abs_diff(*before)) / seconds.filter(|seconds| *seconds > 0.0)?;
            Some(if pages < before { -change } else { change })
        };
        now.iter().map(rate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_processes_and_not_of_process_ids() {
        let process = |pid, identity| ProcessId { pid, identity };
        let before = [(process(7, 100), 50), (process(8, 101), 60), (process(9, 102), 70)];
        let rates = Rates(Some((Instant::now(), before.into_iter().collect())));
        let now = [
            (process(7, 100), 150),
            // Restarted with the same process id, and a process that starts.
            (process(8, 205), 61),
            (process(10, 206), 5),
            // Gave pages back.
            (process(9, 102), 60),
        ];
        assert_eq!(rates.rates(&now, Some(2.0)), [Some(50.0), None, None, Some(-5.0)]);
        assert_eq!(rates.rates(&now[..1], Some(0.0)), [None]);
        assert_eq!(Rates::default().rates(&now[..1], None), [None]);
    }
}
