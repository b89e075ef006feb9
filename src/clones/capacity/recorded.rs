//! The measurements of a template's clones in a recording.

use std::path::Path;

use crate::clones::recording::{CloneSample, Recording};
use crate::error::Result;
use crate::store::Digest;
use crate::sys::process::ProcessId;
use crate::units::{Bytes, approximate};

/// Memory of one clone at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recorded {
    /// The process of the clone.
    pub process: ProcessId,
    /// Time since its start.
    pub age_seconds: f64,
    /// Memory that it took alone, in RAM and swap.
    pub bytes: f64,
}

/// Reads the measurements of the clones of a template.
///
/// # Errors
/// Returns an error if the recording cannot be read.
pub fn recorded(path: &Path, digest: &Digest) -> Result<Vec<Recorded>> {
    let alone = |clone: &CloneSample| {
        clone.private_bytes + clone.page_table_bytes + clone.overhead_bytes + clone.disk_bytes
    };
    let mut found = Vec::new();
    for sample in Recording::open(path)?.samples() {
        let sample = sample?;
        let totals = &sample.totals;
        // A sum of Bytes could overflow: a file may have any figures.
        let sum: f64 = sample.clones.iter().map(|clone| approximate(alone(clone).get())).sum();
        let counted_once =
            totals.private_bytes + totals.page_table_bytes + totals.overhead_bytes + totals.disk_bytes;
        // The totals of several templates do not say which clones share frames.
        let is_alone = sample.clones.iter().all(|clone| clone.digest == *digest);
        let correction = if is_alone { share(counted_once, sum, totals.clones) } else { 0.0 };
        for clone in sample.clones.iter().filter(|clone| clone.digest == *digest && is_running(clone)) {
            let Some(age_ms) = clone.age_ms else { continue };
            found.push(Recorded {
                process: ProcessId { pid: clone.pid, identity: clone.identity },
                age_seconds: approximate(age_ms) / 1000.0,
                bytes: (approximate((alone(clone) + clone.swap_bytes).get()) + correction).max(0.0),
            });
        }
    }
    Ok(found)
}

/// Returns false for a process that only keeps a working set in RAM: it maps the template and copies nothing.
fn is_running(clone: &CloneSample) -> bool {
    clone.kind != "other" || clone.dirty_pages.get() > 0
}

/// Returns by how much the memory of each clone differs from what its process shows. The sums count frames that clones
/// share once, and include page tables of KVM.
pub(super) fn share(counted_once: Bytes, sum: f64, clones: u64) -> f64 {
    (approximate(counted_once.get()) - sum) / approximate(clones.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clones::recording::{Recorder, Sample, TotalsSample};
    use crate::units::PageCount;

    fn clone(pid: u32, digest: Digest, age_ms: Option<u64>) -> CloneSample {
        CloneSample {
            id: pid.to_string(),
            pid,
            identity: u64::from(pid) * 10,
            kind: "qemu".to_owned(),
            digest,
            age_ms,
            mapped_bytes: Bytes::new(1 << 20),
            mapped_clean_bytes: Bytes::ZERO,
            dirty_pages: PageCount::new(1),
            private_bytes: Bytes::new(1000),
            swap_bytes: Bytes::new(5),
            page_table_bytes: Bytes::new(200),
            overhead_bytes: Bytes::new(30),
            disk_bytes: Bytes::new(4),
        }
    }

    #[test]
    fn reads_the_clones_of_the_template_with_the_memory_that_they_share_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.rec");
        let (ours, other) = (Digest::new([1; 32]), Digest::new([2; 32]));
        let keeper =
            CloneSample { kind: "other".to_owned(), dirty_pages: PageCount::ZERO, ..clone(9, ours, Some(1)) };
        let clones = vec![clone(1, ours, Some(1500)), clone(2, ours, None), clone(3, ours, None), keeper];
        // Four times 1234 bytes, of which 400 were counted twice.
        let totals = TotalsSample {
            clones: 4,
            private_bytes: Bytes::new(3600),
            page_table_bytes: Bytes::new(800),
            overhead_bytes: Bytes::new(120),
            disk_bytes: Bytes::new(16),
            ..TotalsSample::default()
        };
        let alone = Sample { clones, totals, ..Sample::default() };
        let mut mixed = alone.clone();
        mixed.clones[2].digest = other;
        let mut recorder = Recorder::open(&path, Bytes::new(1 << 20)).unwrap();
        recorder.append(&alone).unwrap();
        recorder.append(&mixed).unwrap();
        let process = ProcessId { pid: 1, identity: 10 };
        // Swapped bytes are added. With another template, frames that its clones share change nothing.
        let expected = [1139.0, 1239.0].map(|bytes| Recorded { process, age_seconds: 1.5, bytes });
        assert_eq!(recorded(&path, &ours).unwrap(), expected);
        assert_eq!(recorded(&path, &Digest::new([3; 32])).unwrap(), []);
        // No figures overflow.
        let most = CloneSample { private_bytes: Bytes::new(1 << 53), ..clone(1, ours, Some(1)) };
        let path = dir.path().join("most.rec");
        let sample = Sample { clones: vec![most; 2048], ..Sample::default() };
        Recorder::open(&path, Bytes::new(1 << 20)).unwrap().append(&sample).unwrap();
        assert_eq!(recorded(&path, &ours).unwrap().len(), 2048);
        std::fs::write(&path, "no recording\n").unwrap();
        assert!(recorded(&path, &ours).is_err());
    }
}
