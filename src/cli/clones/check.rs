//! `stencil check`: proves that clones share the memory of their template.

use std::collections::HashSet;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::cli::value_parsers::word;
use crate::clones::check::{Candidate, Check, Checked, Host};
use crate::clones::counted;
use crate::clones::registry::process_tree::ProcessTrees;
use crate::clones::registry::{self, Entry};
use crate::control::Served;
use crate::error::{Code, Error, Result};
use crate::sanitize::{path_text, sanitize};
use crate::store::{Digest, Store, TemplateRef};

/// Prove that clones share the memory of their template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil check c1a2b3c4
  stencil check 4711 --template web:1 --serving passthrough
  stencil check --all --json")]
pub struct CheckArgs {
    /// Ids or process ids of the clones
    #[arg(value_name = "CLONE", required_unless_present = "all", conflicts_with = "all")]
    clones: Vec<String>,
    /// Check all clones, and all other processes that map a template
    #[arg(long)]
    all: bool,
    /// Template that the clones must map [default: that of the clone's record, or of the first mapping]
    #[arg(long, value_name = "T")]
    template: Option<TemplateRef>,
    /// How the files must be served: kernel, passthrough or decode [default: as the mount would serve them now]
    #[arg(long, value_name = "HOW", value_parser = word::<Served>)]
    serving: Option<Served>,
}

#[derive(Debug, Serialize)]
struct CheckReport {
    clones: Vec<Checked>,
}

impl Report for CheckReport {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.clones.is_empty() {
            return writeln!(out, "no clones");
        }
        for clone in &self.clones {
            let (id, pid) = (sanitize(&clone.id), clone.pid);
            let process =
                if clone.id == pid.to_string() { String::new() } else { format!(", process {pid}") };
            writeln!(out, "{id}{process}: {}", if clone.ok { "ok" } else { "failed" })?;
            for Check { name, why, remedy, .. } in clone.checks.iter().filter(|check| !check.ok) {
                writeln!(out, "  {}: {}", name.name(), sanitize(why))?;
                writeln!(out, "    hint: {}", sanitize(remedy.as_deref().unwrap_or_default()))?;
            }
        }
        // A clone can have several processes.
        let ids: HashSet<&str> = self.clones.iter().map(|clone| clone.id.as_str()).collect();
        let failed = self.clones.iter().filter(|clone| !clone.ok).map(|clone| clone.id.as_str());
        let failed = failed.collect::<HashSet<_>>().len();
        if failed > 0 {
            let all = counted(ids.len() as u64, "clone", "clones");
            writeln!(out, "{failed} of {all} failed")?;
        }
        Ok(())
    }
}

/// Checks the clones. The command exits with [`Code::CheckFailed`] if a property of a clone is not proven.
///
/// # Errors
/// Returns `Code::NotFound` if no clone has one of the ids, and an error if the mounts cannot be listed.
pub fn run(args: &CheckArgs, global: &Global) -> Result<Done> {
    let filter = StoreFilter::of(global)?;
    let digest = args.template.as_ref().map(|t| Store::open(&global.store)?.resolve(t)).transpose()?;
    let mut host = Host::new()?;
    let (entries, mut unread) = registry::list_and_unread()?;
    let mounts_unread = host.take_unread();
    let mut candidates = if args.all {
        for mountpoint in host.strangers(|store| filter.has(store, "")) {
            let place = path_text(mountpoint);
            log::warn!(
                "{place}: the mount has no readable record in this runtime directory, so processes that map its \
                 templates were not searched; run this command with the STENCIL_RUNTIME_DIR of the mount"
            );
        }
        unread.extend(mounts_unread);
        all(&host, &filter, &entries)?
    } else {
        mounts_unread.iter().for_each(|error| log::warn!("{error}"));
        let (candidates, has_strangers) = named(&args.clones, &filter, &entries)?;
        // The expected template of a process without a clone may be in a record that cannot be read.
        if !has_strangers {
            unread.clear();
        }
        candidates
    };
    let mut clones = Vec::new();
    if let Some(digest) = digest {
        // A record of another template contradicts the expectation.
        candidates.retain(|candidate| match candidate.digest {
            Some(recorded) if recorded != digest => {
                clones.push(Checked::of_other_template(candidate, &recorded, &digest));
                false
            }
            _ => true,
        });
        candidates.iter_mut().for_each(|candidate| candidate.digest = Some(digest));
    }
    clones.extend(host.check(&candidates, args.serving));
    let is_ok = clones.iter().all(|clone| clone.ok);
    let done = Done::report(CheckReport { clones });
    let done = if is_ok { done } else { done.exit_as(Code::CheckFailed) };
    // A record that cannot be read may belong to a living clone, or to a mount that processes use.
    Ok(match unread.into_iter().reduce(Error::and) {
        Some(error) => done.but_failed(error),
        None => done,
    })
}

/// Returns the clones with these ids or process ids, and whether a process belongs to no clone.
fn named(clones: &[String], filter: &StoreFilter, entries: &[Entry]) -> Result<(Vec<Candidate>, bool)> {
    let trees = ProcessTrees::scan(entries);
    let mut has_strangers = false;
    let candidate = |clone: &String| {
        if let Some(entry) = entries.iter().find(|entry| entry.id == *clone) {
            entry.expect_ours()?;
            filter.expect(entry)?;
            let mut candidate = of_entry(entry, &trees)?;
            // A process that is stuck may belong to the clone. The check fails if the process cannot be inspected.
            candidate.pids.extend(trees.unseen(entry).iter().filter(|pid| **pid != entry.pid));
            return Ok(candidate);
        }
        let pid: u32 = clone.parse().map_err(|_| {
            Error::not_found(format!("no clone has the id '{clone}'"))
                .hint("run 'stencil ps' to list the clones")
        })?;
        let is_its = |entry: &&Entry| trees.of(entry).iter().any(|process| process.pid == pid);
        let digest = entries.iter().find(is_its).map(digest_of).transpose()?;
        has_strangers |= digest.is_none();
        Ok(Candidate { id: pid.to_string(), pids: vec![pid], digest })
    };
    let candidates: Result<_> = clones.iter().map(candidate).collect();
    Ok((candidates?, has_strangers))
}

/// Returns all clones that have not ended, and all other processes that map a template.
fn all(host: &Host, filter: &StoreFilter, entries: &[Entry]) -> Result<Vec<Candidate>> {
    let trees = ProcessTrees::scan(entries);
    let mut candidates = Vec::new();
    for entry in entries.iter().filter(|entry| filter.has_clone(entry)) {
        if entry.is_foreign() || entry.is_launching() || !trees.of(entry).is_empty() {
            candidates.push(of_entry(entry, &trees)?);
        }
    }
    let ours: HashSet<u32> =
        entries.iter().flat_map(|entry| trees.of(entry)).map(|process| process.pid).collect();
    let (users, unseen) = host.users(|store, id| filter.has(store, id))?;
    let others = users.into_iter().chain(unseen.pids()).filter(|pid| !ours.contains(pid));
    candidates.extend(others.map(|pid| Candidate { id: pid.to_string(), pids: vec![pid], digest: None }));
    Ok(candidates)
}

fn of_entry(entry: &Entry, trees: &ProcessTrees) -> Result<Candidate> {
    let mut pids: Vec<u32> = trees.of(entry).iter().map(|process| process.pid).collect();
    // The check reports that this process has exited.
    if pids.is_empty() && entry.process().is_some() {
        pids.push(entry.pid);
    }
    Ok(Candidate { id: entry.id.clone(), pids, digest: Some(digest_of(entry)?) })
}

fn digest_of(entry: &Entry) -> Result<Digest> {
    entry.template.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_with_several_processes_is_counted_once() {
        let row = |id: &str, pid| {
            let candidate = Candidate { id: id.to_owned(), pids: vec![pid], digest: None };
            let digests = [1, 2].map(|byte| Digest::new([byte; 32]));
            Checked::of_other_template(&candidate, &digests[0], &digests[1])
        };
        let proven = Checked { ok: true, ..row("b", 3) };
        let mut text = Vec::new();
        CheckReport { clones: vec![row("a", 1), row("a", 2), proven] }.text(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().ends_with("\n1 of 2 clones failed\n"));
    }
}
