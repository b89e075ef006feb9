//! `stencil density --why`: why clones take more memory than they need.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::cli::output::to_json;
use crate::clones::accounting::{self, Code, Density, Reasons, Statuses, Survey};
use crate::clones::counted;
use crate::control::{Mount, Served, TemplateStatus};
use crate::error::Result;
use crate::sanitize::{self, sanitize};
use crate::store::Digest;
use crate::units::Bytes;

/// What `--why` adds to a report.
#[derive(Debug)]
pub struct Explanation {
    reasons: Reasons,
    /// How each template is served, by each mount of its store.
    served: BTreeMap<Digest, Vec<ServedBy>>,
}

#[derive(Debug, Serialize)]
struct ServedBy {
    #[serde(serialize_with = "sanitize::path")]
    mountpoint: PathBuf,
    /// How the next open of the largest file of the template is served.
    serving: Served,
    /// Why that file is served by decode.
    why: Option<String>,
}

impl Explanation {
    /// Asks the mounts how they serve templates, and finds the reasons.
    ///
    /// # Errors
    /// Same as [`accounting::reasons`].
    pub fn new(mounts: &[Mount], survey: &Survey) -> Result<Explanation> {
        let mut served: BTreeMap<Digest, Vec<ServedBy>> = BTreeMap::new();
        let mut statuses = Statuses::new();
        for (index, mount) in mounts.iter().enumerate() {
            let status = mount.status();
            let unanswered = status.as_ref().err().filter(|_| !mount.is_dead());
            unanswered.iter().for_each(|error| log::warn!("{error}"));
            for template in status.iter().flat_map(|status| &status.templates) {
                let TemplateStatus { digest, serving, why, .. } = template;
                let mountpoint = mount.mountpoint.clone();
                let by = ServedBy { mountpoint, serving: *serving, why: why.clone() };
                served.entry(*digest).or_default().push(by);
            }
            statuses.insert(index, status.ok());
        }
        Ok(Explanation { reasons: accounting::reasons_with(mounts, statuses, survey)?, served })
    }

    /// Adds the reasons to the rows of templates and clones.
    pub fn add_to(&self, report: &mut Value, density: &Density) {
        for (row, template) in rows(report, "templates").zip(&density.templates) {
            let list = self.reasons.templates.get(&template.digest).map_or(&[][..], Vec::as_slice);
            row["reasons"] = to_json(&list);
            let list = self.served.get(&template.digest).map_or(&[][..], Vec::as_slice);
            row["served"] = to_json(&list);
        }
        for (row, list) in rows(report, "clones").zip(&self.reasons.clones) {
            row["reasons"] = to_json(list);
        }
    }

    /// Prints each code once, with its sum, the number of clones and the remedy.
    ///
    /// # Errors
    /// Returns an error if writing to `out` fails.
    pub fn print(&self, density: &Density, out: &mut dyn Write) -> io::Result<()> {
        let Explanation { reasons, served } = self;
        writeln!(out, "\nserving of the next open")?;
        for template in &density.templates {
            for ServedBy { mountpoint, serving, why } in served.get(&template.digest).into_iter().flatten() {
                let (id, place) = (template.digest.short(), sanitize::path_text(mountpoint));
                let why = why.as_ref().map_or_else(String::new, |why| format!(": {}", sanitize(why)));
                writeln!(out, "  {id}  {place}  {}{why}", serving.name())?;
            }
        }
        writeln!(out, "\nreasons")?;
        let mut sums: BTreeMap<(Code, &str), Sum> = BTreeMap::new();
        for row in &density.templates {
            let name =
                row.digest.short() + &row.tags.first().map_or_else(String::new, |tag| format!(" {tag}"));
            for reason in reasons.templates.get(&row.digest).into_iter().flatten() {
                sums.entry((reason.code, reason.remedy)).or_default().add(reason.bytes, &name, false);
            }
        }
        for (row, list) in density.clones.iter().zip(&reasons.clones) {
            for reason in list {
                sums.entry((reason.code, reason.remedy)).or_default().add(reason.bytes, &row.id, true);
            }
        }
        if sums.is_empty() {
            return writeln!(out, "  none");
        }
        for ((code, remedy), sum) in sums {
            writeln!(out, "  {:<20}{:>10}  {}", code.name(), sum.bytes.to_string(), sum.place())?;
            writeln!(out, "    {remedy}")?;
        }
        Ok(())
    }
}

/// The memory of one code. A code is either of clones or of templates.
#[derive(Debug, Default)]
struct Sum {
    bytes: Bytes,
    count: u64,
    is_of_clones: bool,
    /// The largest part, and the clone or template that has the part.
    largest: (Bytes, String),
}

impl Sum {
    fn add(&mut self, bytes: Bytes, name: &str, is_of_clone: bool) {
        self.bytes += bytes;
        self.count += 1;
        self.is_of_clones = is_of_clone;
        if bytes > self.largest.0 {
            self.largest = (bytes, name.to_owned());
        }
    }

    fn place(&self) -> String {
        let largest = sanitize(&self.largest.1);
        let all = match self.is_of_clones {
            true => counted(self.count, "clone", "clones"),
            false => counted(self.count, "template", "templates"),
        };
        match self.count {
            1 => format!("{all}: {largest}"),
            _ => format!("{all}, most by {largest}"),
        }
    }
}

fn rows<'a>(report: &'a mut Value, name: &str) -> impl Iterator<Item = &'a mut Value> {
    report[name].as_array_mut().into_iter().flatten()
}
