//! `stencil density --why`: why clones take more memory than they need.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::cli::output::to_json;
use crate::clones::accounting::{self, Code, Density, Reasons, Survey};
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
        for mount in mounts {
            let status = match mount.status() {
                Ok(status) => status,
                Err(_) if mount.is_dead() => continue,
                Err(error) => {
                    log::warn!("{error}");
                    continue;
                }
            };
            for template in status.templates {
                let TemplateStatus { digest, serving, why, .. } = template;
                let by = ServedBy { mountpoint: mount.mountpoint.clone(), serving, why };
                served.entry(digest).or_default().push(by);
            }
        }
        Ok(Explanation { reasons: accounting::reasons(mounts, survey)?, served })
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
        let mut sums: BTreeMap<(Code, &str), (u64, Bytes)> = BTreeMap::new();
        let of_clones = reasons.clones.iter().flatten().map(|reason| (reason, 1));
        let shown = density.templates.iter().filter_map(|row| reasons.templates.get(&row.digest));
        let of_templates = shown.flatten().map(|reason| (reason, 0));
        for (reason, count) in of_templates.chain(of_clones) {
            let (clones, bytes) = sums.entry((reason.code, reason.remedy)).or_default();
            *clones += count;
            *bytes += reason.bytes;
        }
        if sums.is_empty() {
            return writeln!(out, "  none");
        }
        for ((code, remedy), (clones, bytes)) in sums {
            let place = match clones {
                0 => "all clones of a template".to_owned(),
                clones => counted(clones, "clone", "clones"),
            };
            writeln!(out, "  {:<20}{:>10}  {place}", code.name(), bytes.to_string())?;
            writeln!(out, "    {remedy}")?;
        }
        Ok(())
    }
}

fn rows<'a>(report: &'a mut Value, name: &str) -> impl Iterator<Item = &'a mut Value> {
    report[name].as_array_mut().into_iter().flatten()
}
