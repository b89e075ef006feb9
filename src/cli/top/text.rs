//! One sample as text or JSON.

use std::io::{self, Write};

use serde_json::Value;

use super::figures::Figures;
use super::rows::{Row, SortKey};
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Report, to_json};
use crate::clones::counted;
use crate::error::{Error, Result};
use crate::units::Bytes;

/// The hint of an error about a measurement that does not return.
pub const FIND_SERVER: &str =
    "run 'stencil status' and 'stencil doctor' to find the server that does not answer";

/// A sample that is printed.
pub struct Frame {
    figures: Figures,
    sort: SortKey,
}

impl Frame {
    pub fn new(figures: Figures, sort: SortKey) -> Frame {
        Frame { figures, sort }
    }

    /// Checks that the sample has figures of the templates.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if they could not be measured.
    pub fn check(&self) -> Result<()> {
        match (&self.figures.totals, &self.figures.problem) {
            (None, Some(problem)) => Err(Error::try_again(problem.clone()).hint(FIND_SERVER)),
            _ => Ok(()),
        }
    }
}

/// Formats a rate, `-` if it is unknown.
pub fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}"))
}

impl Report for Frame {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Columns::new(&[
            Text("TEMPLATE"),
            Text("SERVING"),
            Number("DATA"),
            Number("RESIDENT"),
            Number("CLONES"),
            Text("TAGS"),
        ]);
        for template in &self.figures.templates {
            table.row([
                template.digest.short(),
                template.serving.clone(),
                template.data_bytes.to_string(),
                template.resident_bytes.to_string(),
                template.clones.to_string(),
                template.tags.iter().cloned().collect::<Vec<_>>().join(", "),
            ]);
        }
        table.print(out)?;
        writeln!(out)?;
        let mut table = Columns::new(&[
            Text("CLONE"),
            Number("PID"),
            Text("STATE"),
            Number("COPIED"),
            Number("CLEAN"),
            Number("TABLES"),
            Number("OVERHEAD"),
            Text("NAME"),
        ]);
        for row in Row::all(&self.figures, self.sort) {
            let size = |part: fn(&crate::clones::accounting::CloneMemory) -> Bytes| {
                row.memory.as_ref().map_or_else(|| "-".to_owned(), |memory| part(memory).to_string())
            };
            let sizes = [
                size(|memory| memory.dirty_pages.bytes()),
                size(|memory| memory.mapped_clean_bytes),
                size(|memory| memory.page_table_bytes),
                size(|memory| memory.overhead_bytes),
            ];
            let pid = row.process.pid.to_string();
            let state = if row.blocked { "blocked" } else { "-" };
            let cells = [row.id, pid, state.to_owned()].into_iter().chain(sizes).chain([row.name]);
            table.row(cells);
        }
        table.print(out)?;
        writeln!(out)?;
        let Some(totals) = &self.figures.totals else { return Ok(()) };
        writeln!(out, "{}, host memory {}", counted(totals.clones, "clone", "clones"), totals.host_bytes)?;
        writeln!(out, "  {:<22}{:>10}", "copied by clones", totals.private_bytes.to_string())?;
        if let Some(bytes) = totals.bytes_per_further_clone {
            writeln!(out, "  {:<22}{:>10}", "one more clone", bytes.to_string())?;
        }
        if !self.figures.blocked.is_empty() {
            let count = self.figures.blocked.len() as u64;
            let processes = counted(count, "process", "processes");
            writeln!(out, "  not counted: {processes} that cannot be inspected")?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        to_json(&self.figures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::top::rows::tests::figures;

    #[test]
    fn rows_have_their_state_and_fit_100_columns() {
        let mut out = Vec::new();
        Frame::new(figures(), SortKey::Copied).text(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let line = |id: &str| -> Vec<&str> {
            let mut words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            words.find(|words| words.first() == Some(&id)).unwrap()
        };
        assert_eq!(line("77"), ["77", "77", "blocked", "-", "-", "-", "-", "actor"]);
        assert_eq!(line("c12")[..5], ["c12", "12", "-", "23.4", "MiB"]);
        assert!(text.contains("5 clones, host memory 130 MiB\n"), "{text}");
        let json = Frame::new(figures(), SortKey::Copied).json();
        assert_eq!(json["unseen"], serde_json::json!([{"pid": 77, "id": null, "command": "actor"}]));
        assert!(json["problem"].is_null() && json.get("blocked").is_none(), "{json}");
        assert!(text.ends_with("not counted: 1 process that cannot be inspected\n"), "{text}");
    }

    #[test]
    fn a_sample_without_templates_is_an_error_of_once() {
        let mut figures = figures();
        assert!(Frame::new(figures.clone(), SortKey::Pid).check().is_ok());
        (figures.totals, figures.problem) = (None, Some("a server does not answer".into()));
        let error = Frame::new(figures, SortKey::Pid).check().unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (crate::error::Code::TryAgain, "a server does not answer")
        );
    }
}
